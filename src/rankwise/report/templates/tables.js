"use strict";
// Sorts a table by a click on a head, filters its rows by words, and saves what any table holds.
(() => {
  const setUp = (table) => {
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

    const input = document.querySelector(`[data-filters="${table.id}"]`);
    const count = document.querySelector(`[data-counts="${table.id}"]`);
    const noun = table.dataset.noun;
    const names = new Map(rows.map((row) => [row, row.cells[0].textContent.toLowerCase()]));
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !words.every((word) => names.get(row).includes(word));
        shown += row.hidden ? 0 : 1;
      }
      count.textContent = words.length ? `${shown} of ${rows.length} ${noun}s` : `${rows.length} ${noun}${rows.length === 1 ? "" : "s"}`;
    };
    input.parentElement.hidden = false;
    input.addEventListener("input", filter);
    filter();
  };
  for (const table of document.querySelectorAll("table.sortable")) setUp(table);

  // --- saving: a picture as it is drawn, or the numbers ---------------------------------------------------------

  // A dash is unknown; a number loses its thousands and gets the minus that programs read; a share is a
  // number and not per cent; the keys of a sortable
  // table are the numbers in full. A word that a spreadsheet would run as a formula is set in quotes of its own.
  const plain = (text) => {
    if (text === "–") return "";
    const number = text.replace(/−/g, "-");
    if (/^[-+]?\d{1,3}(,\d{3})+(\.\d+)?$/.test(number)) return number.replace(/,/g, "");
    if (/^[-+]?\d+(\.\d+)?(e[-+]?\d+)?$/.test(number)) return number;
    const share = /^([-+]?)(\d+)(?:\.(\d+))? %$/.exec(number);
    if (share) {
      const whole = share[2].padStart(3, "0");
      return share[1] + `${whole.slice(0, -2)}.${whole.slice(-2)}${share[3] || ""}`.replace(/\.?0+$/, "");
    }
    return /^[=+\-@\t\r]/.test(text) ? "'" + text : text;
  };
  const field = (text) => (/[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);
  const csv = (rows) => rows.map((row) => row.map((cell) => field(plain(String(cell ?? "")))).join(",") + "\r\n").join("");

  const words = (cell) => (cell.dataset.key ? cell.dataset.key : cell.textContent.trim());
  const tableRows = (table) => [...table.rows].map((row) => [...row.cells].map(words));

  // The numbers of a figure without a table of its own: what is drawn, a row a point.
  const shownText = (text) => String(text).replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  const drawnRows = (plot) => {
    const rows = [["line", "x", "y", "value"]];
    for (const trace of plot._fullData) {
      const name = shownText(trace.meta || trace.name || "");
      if (trace.z) {
        trace.z.forEach((line, j) => [...line].forEach((z, i) => rows.push([name, trace.x ? trace.x[i] : i, trace.y ? trace.y[j] : j, z])));
      } else {
        [...(trace.x || [])].forEach((x, i) => { if (x !== null) rows.push([name, x, trace.y[i], ""]); });
      }
    }
    return rows;
  };

  const save = (text, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff", text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  const button = (place, label, title, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "button";
    made.textContent = label;
    made.setAttribute("aria-label", title);
    made.addEventListener("click", act);
    place.append(made);
  };

  for (const place of document.querySelectorAll("[data-save]")) {
    const name = place.dataset.save;
    const plot = document.getElementById(name + "-plot");
    const table = place.parentElement.querySelector(".numbers:not([data-drawn]) table");
    place.append("Save as");
    for (const format of ["png", "svg"]) {
      button(place, format.toUpperCase(), `Save ${name} as ${format.toUpperCase()}`, () =>
        Plotly.downloadImage(plot, { format, filename: name, width: plot.clientWidth, height: plot.clientHeight, scale: format === "png" ? 2 : 1 }));
    }
    button(place, "CSV", `Save the numbers of ${name} as CSV`, () => save(csv(table ? tableRows(table) : drawnRows(plot)), name + ".csv"));
    place.hidden = false;
  }
  // The same rows under a figure whose numbers go with its selector: made when they are asked for, and kept current.
  const fill = (place, plot) => {
    const [head, ...rows] = drawnRows(plot);
    const { xaxis, yaxis } = plot._fullLayout;
    const title = (axis, other) => (axis.title.text || other).replace(" (log scale)", "");
    const titles = [head[0], title(xaxis, head[1]), title(yaxis, head[2]), head[3]];
    const kept = [0, 1, 2, 3].filter((k) => rows.some((row) => row[k] !== "" && row[k] !== null));
    const cells = (values, tag) => {
      const line = document.createElement("tr");
      for (const k of kept) line.appendChild(document.createElement(tag)).textContent = values[k] ?? "–";
      return line;
    };
    const table = document.createElement("table");
    table.className = "small named";
    table.createTHead().append(cells(titles, "th"));
    table.createTBody().append(...rows.map((row) => cells(row, "td")));
    const frame = document.createElement("div");
    frame.className = "scroll tall";
    frame.tabIndex = 0;
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", place.querySelector("summary").textContent);
    frame.append(table);
    place.querySelector(".scroll")?.remove();
    place.append(frame);
  };
  for (const place of document.querySelectorAll("[data-drawn]")) {
    const plot = document.getElementById(place.dataset.drawn + "-plot");
    let follows = false;
    place.addEventListener("toggle", () => {
      if (!place.open) return;
      fill(place, plot);
      if (!follows) plot.on("plotly_afterplot", () => { if (place.open) fill(place, plot); });
      follows = true;
    });
    place.hidden = false;
  }
  for (const place of document.querySelectorAll("[data-table]")) {
    const name = place.dataset.table;
    place.append("Save as");
    button(place, "CSV", `Save ${name} as CSV`, () => save(csv(tableRows(document.getElementById(name))), name + ".csv"));
    place.hidden = false;
  }
})();
