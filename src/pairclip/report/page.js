"use strict";
// Everything is in the page already: this sorts, filters and points.

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const value = (row, column) => {
    const number = parseFloat(row.cells[column].textContent);
    return Number.isNaN(number) ? -Infinity : number;
  };
  const compare = (column) => (a, b) =>
    column > 0
      ? value(a, column) - value(b, column) || 0
      : a.cells[0].textContent.localeCompare(b.cells[0].textContent);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      // Names start from A, metrics from the highest; a second click turns that round.
      const first = column > 0 ? "descending" : "ascending";
      const other = column > 0 ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const rows = [...body.rows].sort(compare(column));
      body.append(...(order === "ascending" ? rows : rows.reverse()));
    });
  });
}

for (const part of document.querySelectorAll(".heatmaps")) {
  const tables = [...part.querySelectorAll("table.heat")];
  const readout = part.querySelector(".readout");
  const point = (row, column) => {
    const cells = tables.map((table) => table.tBodies[0].rows[row]?.cells[column]);
    if (column < 1 || !cells[0]) return;
    part.querySelectorAll(".chosen").forEach((cell) => cell.classList.remove("chosen"));
    cells.forEach((cell) => cell.classList.add("chosen"));
    const names = cells[0].title.slice(0, cells[0].title.lastIndexOf(":"));
    const values = cells.map((cell, i) => `${tables[i].dataset.when} ${cell.textContent}`);
    readout.textContent = `${names}: ${values.join(", ")}`;
  };
  const pointAt = (event) => {
    const cell = event.target.closest("tbody td");
    if (cell) point(cell.parentNode.sectionRowIndex, cell.cellIndex);
  };
  readout.textContent = "Point at a cell, tap it, or use the arrow keys.";
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  for (const table of tables) {
    table.addEventListener("pointerover", pointAt);
    table.addEventListener("click", pointAt);
    table.parentNode.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const chosen = table.querySelector(".chosen");
      if (!chosen) return point(0, 1);
      point(chosen.parentNode.sectionRowIndex + move[0], chosen.cellIndex + move[1]);
      table.querySelector(".chosen").scrollIntoView({ block: "nearest", inline: "nearest" });
    });
  }
}

for (const form of document.querySelectorAll(".filters")) {
  const cases = [...form.parentNode.querySelectorAll(".cases > li")];
  const update = () => {
    const { kind, class: ofClass } = form.elements;
    let shown = 0;
    for (const item of cases) {
      item.hidden =
        (kind.value !== "" && kind.value !== item.dataset.kind) ||
        (ofClass.value !== "" && ofClass.value !== item.dataset.class);
      shown += item.hidden ? 0 : 1;
    }
    const chosen = kind.value !== "" || ofClass.value !== "";
    for (const rest of form.parentNode.querySelectorAll("details")) rest.open = chosen;
    for (const part of form.parentNode.querySelectorAll(".kind"))
      part.hidden = kind.value !== "" && kind.value !== part.dataset.kind;
    form.querySelector("output").textContent = `${shown} of ${cases.length} queries`;
  };
  form.addEventListener("change", update);
  form.hidden = false;
  update();
}
