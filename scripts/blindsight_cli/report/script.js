// The page reads without this. It shows a cell's <title> at once and marks the same head elsewhere; it sorts tables.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const cells = new Map(); // "layer.head" -> its rectangles in all pictures
  const tips = new Map(); // rectangle -> text; the <title> goes, or browsers would show both
  for (const title of document.querySelectorAll("svg.cells rect > title")) {
    const rect = title.parentNode;
    tips.set(rect, title.textContent);
    title.remove();
    const at = rect.dataset.at;
    if (at) cells.set(at, [...(cells.get(at) || []), rect]);
  }

  let marked = [];
  function hide() {
    tip.hidden = true;
    for (const rect of marked) rect.classList.remove("same");
    marked = [];
  }
  function show(rect) {
    hide();
    tip.textContent = tips.get(rect);
    tip.hidden = false;
    const box = rect.getBoundingClientRect();
    const left = Math.min(box.right + 10, innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 10;
    const top = below + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 10 : below;
    tip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
    marked = cells.get(rect.dataset.at) || [];
    for (const other of marked) other.classList.add("same");
  }
  document.addEventListener("pointerover", (event) => (tips.has(event.target) ? show(event.target) : hide()));
  document.addEventListener("scroll", hide, { passive: true, capture: true });

  // The category map by keyboard: one tab stop, arrow keys walk over the heads.
  const map = document.querySelector("svg.map");
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  let here = [0, 0];
  const cell = ([layer, head]) => map.querySelector(`[data-at="${layer}.${head}"]`);
  map.setAttribute("tabindex", "0");
  map.addEventListener("blur", hide);
  map.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const next = [here[0] + step[0], here[1] + step[1]];
    if (!tip.hidden && cell(next)) here = next;
    show(cell(here));
  });

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    table.querySelectorAll("thead tr.keys th").forEach((th, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...th.childNodes);
      th.append(button);
      button.addEventListener("click", () => {
        const down = th.getAttribute("aria-sort") === "ascending";
        for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
        th.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].textContent;
        const rows = [...body.rows].sort((a, b) => key(a).localeCompare(key(b), "en", { numeric: true }));
        body.append(...(down ? rows.reverse() : rows));
      });
    });
  }
})();
