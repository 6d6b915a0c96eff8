"use strict";

// Tables: a heading sorts by its column, numbers from the largest down, words from A up; the third time as it was.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const before = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.firstElementChild.addEventListener("click", () => {
      const orders = heading.classList.contains("number") ? ["descending", "ascending"] : ["ascending", "descending"];
      const next = { null: orders[0], [orders[0]]: orders[1], [orders[1]]: null }[heading.getAttribute("aria-sort")];
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      const rows = [...before];
      if (next) {
        heading.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        rows.sort((one, other) => compare(one.cells[column], other.cells[column], sign));
      }
      body.append(...rows);
    });
  });
}

// Cells without a number stand last, whichever way.
function compare(one, other, sign) {
  const [a, b] = [one, other].map((cell) => cell.dataset.value);
  if (a !== undefined && b !== undefined) return sign * (Number(a) - Number(b));
  if (a !== undefined || b !== undefined) return a !== undefined ? -1 : 1;
  return sign * one.textContent.localeCompare(other.textContent, "en", { numeric: true });
}

// Charts: one of several views.
for (const choice of document.querySelectorAll(".chart select")) {
  const views = choice.closest(".chart").querySelectorAll(":scope > .view");
  const show = () => views.forEach((view, place) => { view.hidden = place !== choice.selectedIndex; });
  choice.addEventListener("change", show);
  show();  // a browser that goes back keeps what was chosen
}

// Curves: the legend switches them, and a pointer finds the nearest.
for (const chart of document.querySelectorAll(".chart")) {
  for (const button of chart.querySelectorAll(".legend button")) {
    const variant = button.dataset.variant;
    const same = (selector) => [...chart.querySelectorAll(selector)].filter((each) => each.dataset.variant === variant);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      same(".legend button").forEach((each) => each.setAttribute("aria-pressed", on));
      same(".plot .curve").forEach((each) => each.classList.toggle("off", !on));
    });
  }
}
const apart = (percent, share) => Math.abs(percent / 100 - share);
for (const plot of document.querySelectorAll(".plot")) {
  const [svg, tip] = [plot.querySelector("svg"), plot.querySelector(".tip")];
  const [steps, values] = ["steps", "values"].map((name) => plot.dataset[name].split(" ").map(Number));
  const curves = [...plot.querySelectorAll(".curve")].map((line) => ({
    line,
    points: line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number)),
  }));
  const leave = () => {
    tip.hidden = true;
    svg.classList.remove("lit");
    curves.forEach(({ line }) => line.classList.remove("near"));
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const [across, down] = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    // Of every curve the point nearest in time, and of those the nearest in height.
    let best = null;
    for (const { line, points } of curves) {
      if (line.classList.contains("off")) continue;
      const near = points.reduce((one, other) => (apart(other[0], across) < apart(one[0], across) ? other : one));
      if (!best || apart(near[1], down) < apart(best.y, down)) best = { line, x: near[0], y: near[1] };
    }
    leave();
    if (!best) return;
    const step = steps[0] + (best.x / 100) * (steps[1] - steps[0]);
    const value = values[0] + (1 - best.y / 100) * (values[1] - values[0]);
    tip.textContent = `${best.line.dataset.label}, step ${Math.round(step)}: ${Number(value.toPrecision(3))}`;
    tip.style.left = `${Math.min(Math.max(best.x, 18), 82)}%`;
    tip.style.top = `${best.y}%`;
    tip.hidden = false;
    svg.classList.add("lit");
    best.line.classList.add("near");
  });
}
