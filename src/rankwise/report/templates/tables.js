"use strict";
// Sorts the table of modules by a click on a head, and filters its rows by words.
(() => {
  const table = document.getElementById("module-table");
  if (!table) return;
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const places = new Map(rows.map((row, place) => [row, place]));

  const key = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim() === "–" ? null : cell.textContent.trim();
    return cell.dataset.key === "" ? null : Number(cell.dataset.key);
  };

  // Unknown values stay last in both directions; equal ones keep the order of the file.
  const sort = (column) => {
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    const numeric = head.dataset.kind === "number";
    const keys = new Map(rows.map((row) => [row, key(row, column, numeric)]));
    const compare = numeric ? (a, b) => a - b : new Intl.Collator("en", { numeric: true }).compare;
    rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === null || y === null) return (x === null) - (y === null) || places.get(a) - places.get(b);
      return (down ? compare(y, x) : compare(x, y)) || places.get(a) - places.get(b);
    });
    body.append(...rows);
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => sort(column));
  });

  const input = document.getElementById("filter");
  const count = document.getElementById("filtered");
  const names = new Map(rows.map((row) => [row, row.cells[0].textContent.toLowerCase()]));
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => names.get(row).includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = words.length ? `${shown} of ${rows.length} modules` : `${rows.length} ${rows.length === 1 ? "module" : "modules"}`;
  };
  input.parentElement.hidden = false;
  input.addEventListener("input", filter);
  filter();
})();
