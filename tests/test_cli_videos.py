"""Video files: which frames a model gets of them, and every command that takes prompts with videos in them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import load_video as load_as_transformers
from typer.testing import CliRunner, Result

from blindsight_cli.backends.torch_backend import TorchBackend
from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.loading import ask, load_processor
from blindsight_cli.main import app
from blindsight_cli.prompt_file import PromptLoader, read_prompts
from blindsight_cli.smallvlm.puzzles import make_puzzle
from blindsight_cli.videos import _mean_rate, load_video
from shared_profiles import Category
from shared_profiles.profile import Profile
from tiny_checkpoints import make_processor
from torch_blindsight.models import inspect_model
from torch_blindsight.prompts import read_layouts

# The matrix that an MP4 has for it, and where that takes pixels.
TURNS: dict[tuple[int, ...], Callable[[np.ndarray], np.ndarray]] = {
    (1, 0, 0, 1): lambda pixels: pixels,
    (0, 1, -1, 0): lambda pixels: np.rot90(pixels, -1, axes=(1, 2)),
    (-1, 0, 0, -1): lambda pixels: pixels[:, ::-1, ::-1],
    (0, -1, 1, 0): lambda pixels: np.rot90(pixels, 1, axes=(1, 2)),
    (-1, 0, 0, 1): lambda pixels: pixels[:, :, ::-1],
    (1, 0, 0, -1): lambda pixels: pixels[:, ::-1],
    (0, 1, 1, 0): lambda pixels: pixels.swapaxes(1, 2),
    (0, -1, -1, 0): lambda pixels: pixels[:, ::-1, ::-1].swapaxes(1, 2),
    (0, 0, 0, 0): lambda pixels: pixels,  # says nothing
}


def save_video(path: Path, n_frames: int, seed: int = 0, rate: int = 10, size: tuple[int, int] = (48, 64)) -> Path:
    """Saves noise of `size` (height, width) that changes from frame to frame, in the container of the path's suffix."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for _ in range(n_frames):
            coarse = rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(coarse.repeat(16, 0).repeat(16, 1), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts of a video, of two with pictures, or of pictures only."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for seed in range(6):
        puzzle = make_puzzle(3, seed)
        for i, picture in enumerate(puzzle.images):
            picture.save(folder / f"{seed}-{i}.png")
        videos = [f"{seed}.mp4", f"{seed}.mkv"]
        for name in videos:
            save_video(folder / name, 40, seed)
        line: dict[str, Any] = {"question": puzzle.question.text, "answer": puzzle.question.answer}
        if seed != 1:
            # Pairs of frames a second apart: transformers 5.17 knows no parts of seconds.
            line |= {"videos": videos[: 1 + seed % 2], "fps": 2}
        if seed in (1, 3, 4):
            line["images"] = [f"{seed}-{i}.png" for i in range(2)]
        lines.append(line)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def blindsight(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


@pytest.mark.parametrize(("fps", "n_frames"), [(None, 8), (1, 4), (5, 20), (100, 40)])
@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_frames_are_those_that_transformers_takes(
    suffix: str, fps: float | None, n_frames: int, processor: Any, tmp_path: Path
) -> None:
    video = load_video(save_video(tmp_path / f"a.{suffix}", 40), processor, fps)
    assert video.frames.shape == (n_frames, 48, 64, 3)
    # An MKV's head does not say how many frames there are, which transformers' reader wants to know.
    like = save_video(tmp_path / "like.mp4", 40) if suffix == "mkv" else tmp_path / f"a.{suffix}"
    choose = partial(processor.video_processor.sample_frames, fps=fps or 2)
    frames, metadata = load_as_transformers(str(like), backend="pyav", sample_indices_fn=choose)
    np.testing.assert_array_equal(video.frames, frames)
    assert video.metadata.frames_indices.tolist() == metadata.frames_indices.tolist()
    assert video.metadata.sampled_fps == metadata.sampled_fps == n_frames / 4
    assert (video.metadata.total_num_frames, video.metadata.fps, video.metadata.duration) == (40, 10.0, 4.0)


def test_the_checkpoint_says_how_many_frames_unless_the_prompt_does(tmp_path: Path) -> None:
    processor, path = load_processor(SHIPPED_MODEL), save_video(tmp_path / "a.mp4", 40)
    processor.video_processor.fps = 4
    assert len(load_video(path, processor).frames) == 16
    assert len(load_video(path, processor, 1).frames) == 4
    processor.video_processor.max_frames = 6
    assert len(load_video(path, processor).frames) == 6
    processor.video_processor.num_frames = 8
    assert len(load_video(path, processor).frames) == 8
    with pytest.raises(ValueError, match="fps must be left out: this checkpoint takes 8 frames of every video"):
        load_video(path, processor, 1)


def test_a_prompts_own_rate_is_taken(processor: Any, tmp_path: Path) -> None:
    save_video(tmp_path / "a.mp4", 40)
    lines = [json.dumps({"videos": ["a.mp4"], "question": "?"} | fps) for fps in ({}, {"fps": 1}, {"fps": 5})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    prompts = PromptLoader(read_prompts(tmp_path / "prompts.jsonl"), tmp_path / "prompts.jsonl", processor, "cpu")
    assert [inputs["video_grid_thw"][0, 0].item() for inputs in prompts] == [4, 2, 10], "pairs of frames"


@pytest.mark.parametrize(("rate", "n", "fps", "n_frames"), [(10, 75, 2, 14), (17, 17, 14, 14)])
def test_rounding_adds_no_frame_behind_the_last(
    rate: int, n: int, fps: float, n_frames: int, processor: Any, tmp_path: Path
) -> None:
    """Where transformers' sampling, n / (n / 14) in floating point, gives frame n as well."""
    video = load_video(save_video(tmp_path / "a.mp4", n, rate=rate), processor, fps)
    assert len(video.frames) == n_frames == len(video.metadata.frames_indices)
    assert max(video.metadata.frames_indices) < n


def test_frames_that_are_never_shown_do_not_count(processor: Any, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.webm"), "w") as video:
        stream = video.add_stream("libvpx", rate=10, options={"lag-in-frames": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                content = bytearray(packet)
                content[0] &= ~0x10 if i in (5, 10) else 0xFF  # VP8's bit show_frame
                hidden = av.Packet(bytes(content))
                hidden.pts, hidden.dts, hidden.time_base, hidden.stream = (
                    packet.pts,
                    packet.dts,
                    packet.time_base,
                    stream,
                )
                video.mux(hidden)
    shown = load_video(tmp_path / "a.webm", processor, 10)
    levels = [10 * i for i in range(20) if i not in (5, 10)]
    np.testing.assert_allclose(shown.frames[:, 0, 0, 0], levels, atol=4)
    assert (shown.metadata.total_num_frames, shown.metadata.duration) == (18, 1.8)


def test_times_of_frames_tell_a_rate_that_the_head_does_not(processor: Any, tmp_path: Path) -> None:
    video = load_video(save_video(tmp_path / "a.ts", 40), processor, 2)
    assert (len(video.frames), video.metadata.fps, video.metadata.duration) == (8, 10, 4)


@pytest.mark.parametrize(
    ("times", "unit"), [([0, 2, None, 6], Fraction(1, 10)), ([3, 3, 3, 3], Fraction(1, 10)), ([0, 2, 4, 6], None)]
)
def test_times_that_tell_no_rate_are_refused(times: list[int | None], unit: Fraction | None) -> None:
    with pytest.raises(ValueError, match="nothing says how many frames there are a second"):
        _mean_rate(times, unit)
    assert _mean_rate([0, 6, 2, 4], Fraction(1, 10)) == 5, "in the order of the packets"


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_frames_that_are_stored_out_of_turn_or_cut_off(suffix: str, processor: Any, tmp_path: Path) -> None:
    """Frames that look ahead come behind what they look at; a film that was cut keeps frames that are not shown."""
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as video:
        stream = video.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    cut = 6 if suffix == "mp4" else 0
    if cut:
        content = bytearray(path.read_bytes())
        at, clock = content.index(b"elst") + 16, content.index(b"mdhd") + 16  # where it begins, and units a second
        start = struct.unpack_from(">i", content, at)[0] + cut * struct.unpack_from(">i", content, clock)[0] // 10
        struct.pack_into(">i", content, at, start)
        path.write_bytes(content)
    video = load_video(path, processor, 10)
    np.testing.assert_allclose(video.frames[:, 0, 0, 0], range(10 * cut, 200, 10), atol=4)
    assert (video.metadata.total_num_frames, video.metadata.fps) == (20 - cut, 10)


NAMES = ("file:b.mp4", "cache:b.mp4", "pipe:0", "http:/127.0.0.1:9/a.mp4", "concat:b.mp4|b.mp4", "a%d.mp4")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_a_name(name: str, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_video(Path("b.mp4"), 8, seed=1)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    wanted = load_video(save_video(Path("a.mp4"), 8).rename(name), processor).frames
    np.testing.assert_array_equal(wanted, load_video(save_video(tmp_path / "a.mp4", 8), processor).frames)


def test_no_other_file_is_read(processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of a pattern, which FFmpeg sees in the names of pictures, nor those that a list names."""
    monkeypatch.chdir(tmp_path)  # from where a list without a name finds its files
    for i in range(8):
        Image.new("RGB", (64, 48), "red").save(tmp_path / f"{i}.png")
    films = [Image.new("RGB", (64, 48), (0, 0, 30 * i)) for i in range(8)]
    films[0].save(tmp_path / "%d.png", save_all=True, append_images=films[1:], duration=100)
    assert load_video(tmp_path / "%d.png", processor, 10).frames[:, 0, 0].tolist() == [[0, 0, 30 * i] for i in range(8)]
    save_video(tmp_path / "b.mp4", 8)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile b.mp4\n")
    with pytest.raises(ValueError, match=r"a video must be one that PyAV can read. Got .*list\.mp4"):
        load_video(tmp_path / "list.mp4", processor)


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_turned_as_the_camera_says(turn: tuple[int, ...], processor: Any, tmp_path: Path) -> None:
    path = save_video(tmp_path / "a.mp4", 8)
    upright = load_video(path, processor).frames
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # the track's matrix, in 16.16 fixed point
    a, b, c, d = (x << 16 for x in turn)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    np.testing.assert_array_equal(load_video(path, processor).frames, TURNS[turn](upright))


def test_what_is_no_video_is_refused(processor: Any, tmp_path: Path) -> None:
    whole = save_video(tmp_path / "a.mp4", 20).read_bytes()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    save_video(tmp_path / "short.mp4", 3)
    assert len(load_video(save_video(tmp_path / "four.mp4", 4), processor, 10).frames) == 4, "two groups are enough"
    with av.open(str(tmp_path / "sound.mp4"), "w") as sound:
        stream = sound.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        sound.mux([*stream.encode(samples), *stream.encode()])
    reasons = {"text": "Invalid data", "cut": "Invalid data", "short": "3 frames. There must", "sound": "no pictures"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"a video must be one .* Got .*{name}\.mp4: .*{reason}"):
            load_video(tmp_path / f"{name}.mp4", processor)
    films = [save_video(tmp_path / f"{width}.avi", 8, size=(48, width)) for width in (64, 96)]
    (tmp_path / "sizes.avi").write_bytes(b"".join(film.read_bytes() for film in films))
    with pytest.raises(ValueError, match=r"sizes.avi: its frames must be of one size. They are of 2"):
        load_video(tmp_path / "sizes.avi", processor, 10)
    with pytest.raises(ValueError, match="Gemma3Processor takes no videos: give pictures"):
        load_video(tmp_path / "a.mp4", make_processor("gemma3"))


def test_frames_that_cannot_be_read_are_missed(processor: Any, tmp_path: Path) -> None:
    path = save_video(tmp_path / "a.avi", 20)
    content = bytearray(path.read_bytes())
    last = content.rindex(b"00dc", 0, content.rindex(b"idx1"))
    size = int.from_bytes(content[last + 4 : last + 8], "little")
    content[last + 8 : last + 8 + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"20 frames of 20 were to be read, 19 could be|Invalid data"):
        load_video(path, processor, 10)


def test_a_template_that_leaves_videos_out_is_refused(tmp_path: Path) -> None:
    processor = load_processor(SHIPPED_MODEL)
    video = load_video(save_video(tmp_path / "a.mp4", 8), processor)
    processor.chat_template = processor.chat_template.replace("'video'", "'film'")
    # Later transformers see it themselves.
    with pytest.raises(ValueError, match=r"must put videos into the prompt|total 0 <\|video_pad\|> tokens"):
        ask(processor, [], "What color?", videos=[video])


def test_layouts_are_those_that_the_patch_sees(processor: Any, data: Path) -> None:
    backend = TorchBackend(SHIPPED_MODEL, "auto", "cpu")
    info = inspect_model(backend.model)
    n_images = []
    for inputs in PromptLoader(read_prompts(data), data, processor, "cpu"):
        (layout,) = backend.facts.layouts(inputs)
        assert [layout] == read_layouts(inputs, info.family, info.special)[0]
        n_images.append(layout.n_images)
    assert n_images == [4, 2, 4, 10, 6, 8]  # four pairs of frames a video


def test_every_command_takes_videos(data: Path, tmp_path: Path) -> None:
    made, in_jax = tmp_path / "torch.json", tmp_path / "jax.json"
    gammas = ("--gamma-sink", 0.4, "--gamma-intra", 0.4, "--gamma-dense", 0.2)
    for out, backend in ((made, "torch"), (in_jax, "jax")):
        options = ("--out", out, *gammas, "--local-block", 8, "--sinks", "0:1", "--limit", 3, "--backend", backend)
        result = blindsight("calibrate", SHIPPED_MODEL, data, *options)
        assert result.exit_code == 0 and "skipped" not in result.stderr, result.stderr
    profiles = Profile.load(made), Profile.load(in_jax)
    np.testing.assert_array_equal(profiles[0].categories, profiles[1].categories)
    assert len(np.unique(profiles[0].categories)) > 1
    sources = [profile.provenance for profile in profiles]
    assert [source.n_prompts for source in sources if source] == [3, 3]
    assert len({source.dataset_hash for source in sources if source}) == 1

    line = json.loads(data.read_text().splitlines()[3])
    asked = [*("--image", data.parent / line["images"][0]), *("--video", data.parent / line["videos"][1]), "--fps", 2]
    told = []
    for backend in ("torch", "jax"):
        result = blindsight(
            *("run", SHIPPED_MODEL, "--question", line["question"], *asked, "--profile", made, "--compare", "--json"),
            *("--backend", backend),
        )
        assert result.exit_code == 0, result.stderr
        told.append(json.loads(result.stdout))
        assert [run["ran"] for run in told[-1]["runs"]] == ["dense", "sparse"]
        assert (told[-1]["n_images"], told[-1]["n_videos"]) == (1, 1)
    assert told[0]["n_tokens"] == told[1]["n_tokens"]
    assert told[0]["kl_nats"] == pytest.approx(told[1]["kl_nats"], rel=1e-2, abs=1e-7)
    result = blindsight("run", SHIPPED_MODEL, "--question", "What color?", *asked, "--dense")
    assert "1 image, 1 video (4 pairs of frames)" in result.stdout

    result = blindsight("profile", "retune", made, "--budget", 0.4, "--verify", SHIPPED_MODEL, _others(data, tmp_path))
    assert result.exit_code == 0, result.stderr
    result = blindsight("analyze", SHIPPED_MODEL, data, "--out", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["n_prompts"] == 6


def _others(data: Path, folder: Path) -> Path:
    """A prompt of a video that is in none of the others."""
    save_video(folder / "other.mp4", 40, seed=9)
    path = folder / "others.jsonl"
    path.write_text(json.dumps({"videos": ["other.mp4"], "question": "What color?"}))
    return path


def test_items_with_videos_are_compared_with_those_calibrated_on(data: Path, tmp_path: Path) -> None:
    facts = TorchBackend(SHIPPED_MODEL, "auto", "cpu").facts
    Profile.uniform(Category.SINK, facts.fingerprint).save(tmp_path / "p.json")
    shutil.copy(data.parent / "0.mp4", tmp_path / "renamed.mp4")
    save_video(tmp_path / "new.mp4", 40, seed=9)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    same = {"videos": ["renamed.mp4"], "question": lines[0]["question"], "answer": "yes"}
    items = [same | {"question": "Another color?"}, same | {"videos": ["new.mp4"]}]
    options = ("--profile", tmp_path / "p.json", "--calibration", data, "--max-new-tokens", 1, "--timed", 0)

    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    result = blindsight("eval", SHIPPED_MODEL, path, "--out", tmp_path / "r.json", *options)
    assert result.exit_code in (0, 1), result.stderr  # 1: no answer is right
    samples = [json.loads(x) for x in (tmp_path / "r.samples.jsonl").read_text().splitlines()[1:]]
    assert [(x["n_seen"], x["n_images"], x["sparse"]["ran"]) for x in samples] == [(1, 4, "sparse"), (0, 4, "sparse")]

    path.write_text("".join(json.dumps(item | {"fps": 1}) + "\n" for item in items))
    result = blindsight("eval", SHIPPED_MODEL, path, "--out", tmp_path / "r.json", *options)
    assert result.exit_code == 2 and "or the result of this very run" in " ".join(result.stderr.split())

    path.write_text("".join(json.dumps(item) + "\n" for item in [*items, same]))
    result = blindsight("eval", SHIPPED_MODEL, path, "--out", tmp_path / "s.json", *options)
    assert result.exit_code == 2 and "are prompts of" in result.stderr and "lines 3" in result.stderr
