"""Video files as frames, read by PyAV: which of them is up to the checkpoint's own processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.video_utils import VideoMetadata

from blindsight_cli.errors import reason_of

if TYPE_CHECKING:
    import av

FPS = 2.0
"""Frames a second where neither the prompt nor the checkpoint says: what Qwen's own tools take."""


@dataclass(frozen=True)
class Video:
    """The frames that a model gets of a video.

    Attributes:
        frames: `[n, height, width, 3]` uint8, RGB, turned and mirrored as the camera says.
        metadata: of the whole video, and which of its frames these are.
    """

    frames: np.ndarray
    metadata: VideoMetadata


def load_video(path: Path, processor: Any, fps: float | None = None) -> Video:
    """Reads the frames of a video that a checkpoint's processor chooses.

    Args:
        path: a file that PyAV can read.
        processor: the checkpoint's.
        fps: frames a second; fewer of a long video, as its processor limits their number. Default: what the checkpoint
            says, else `FPS`.

    Raises:
        ValueError: the family takes no videos, or a fixed number of frames whatever their rate; the file cannot be read
            as a video, or is too short for two groups of frames.
    """
    taker = getattr(processor, "video_processor", None)
    if taker is None:
        raise ValueError(f"{type(processor).__name__} takes no videos: give pictures. Got {path}.")
    if fps is not None and taker.num_frames is not None:
        raise ValueError(f"fps must be left out: this checkpoint takes {taker.num_frames} frames of every video.")
    with _open_video(path) as video:
        stream = video.streams.video[0]
        # Not what the file's head says, which counts frames that are cut off, too, or is not there.
        times = [packet.pts for packet in video.demux(stream) if _is_shown(packet)]
        n = len(times)
        if n < 2 * taker.temporal_patch_size:
            raise ValueError(f"{n} frames. There must be {2 * taker.temporal_patch_size} or more; else give pictures")
        rate = float(stream.average_rate or _mean_rate(times, stream.time_base))
        metadata = VideoMetadata(n, fps=rate, duration=n / rate, video_backend="pyav")
        chosen = np.asarray(taker.sample_frames(metadata, fps=fps or taker.fps or FPS))
        metadata.frames_indices = chosen[chosen < n]  # torch.arange's rounding may have added n itself
    wanted = set(metadata.frames_indices.tolist())
    with _open_video(path) as video:
        frames = [_pixels(frame) for i, frame in enumerate(video.decode(video=0)) if i in wanted]
        if len(frames) < len(wanted):
            raise ValueError(f"{len(wanted)} frames of {n} were to be read, {len(frames)} could be. Convert it")
        if len(sizes := {frame.shape[:2] for frame in frames}) > 1:
            raise ValueError(f"its frames must be of one size. They are of {len(sizes)}. Convert it")
    return Video(np.stack(frames), metadata)


def check_video(path: Path) -> None:
    """Looks at the beginning of a video's file only.

    Raises:
        ValueError: it does not begin like a video.
    """
    with _open_video(path):
        pass


def _mean_rate(times: list[int | None], unit: Fraction | None) -> Fraction:
    """Frames a second by the times of the frames, in units of `unit` seconds: what browsers record states none."""
    known = [time for time in times if time is not None]
    if unit is None or len(known) < len(times) or max(known) == min(known):
        raise ValueError("nothing says how many frames there are a second. Convert it")
    return (len(known) - 1) / ((max(known) - min(known)) * unit)


def _is_shown(packet: av.Packet[Any]) -> bool:
    """Whether a packet of a video gives a frame; VP8 has some that are never shown, by a bit in their first byte."""
    if packet.size == 0 or packet.is_discard:
        return False
    return packet.stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """One frame as `[height, width, 3]` uint8, turned and mirrored as the file says."""
    pixels, matrix = frame.to_ndarray(format="rgb24"), frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # right is shown towards (a, b), down towards (c, d)
    if a * d < b * c:
        pixels = pixels[::-1]  # mirrored; `rotation` is that of the x axis alone
    return np.rot90(pixels, round(frame.rotation / 90)) if a or b else pixels


@contextmanager
def _open_video(path: Path) -> Iterator[Any]:
    """An open video; whatever goes wrong with it is a ValueError that names it."""
    import av  # here, as prompts without videos need none

    try:
        # Without its name, in which FFmpeg sees protocols ("http:") and patterns ("%d.png"); a list's files stay shut.
        with (
            open(path, "rb") as file,
            open(file.fileno(), "rb", closefd=False) as nameless,
            av.open(nameless, options={"protocol_whitelist": "none"}) as video,
        ):
            if not video.streams.video:
                raise ValueError("it has no pictures")
            video.streams.video[0].thread_type = "AUTO"
            yield video
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"a video must be one that PyAV can read. Got {path}: {reason_of(error)}.") from error
