"use strict";
// Draws the figures in the page's colours, follows the theme, and changes what a selector chooses.
(() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const specs = new Map();

  // "@name" under a key that ends in "color" stands for the custom property --name.
  const paint = (value, style, key = "") => {
    if (typeof value === "string") {
      const token = value.startsWith("@") && key.endsWith("color");
      return token ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    }
    if (Array.isArray(value)) {
      return value.length && typeof value[0] === "object" && !Array.isArray(value[0]) ? value.map((v) => paint(v, style, key)) : value;
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, style, k)]));
  };

  const draw = (name) => {
    const spec = specs.get(name);
    const style = getComputedStyle(root);
    const choice = spec.choices[spec.chosen];
    const data = choice ? spec.data.map((trace, i) => ({ ...trace, ...(choice.data[i] || {}) })) : spec.data;
    const layout = paint({ ...spec.layout, ...(choice ? choice.layout : {}) }, style);
    layout.font.family = style.getPropertyValue("--plain").trim();
    layout.dragmode = touch ? false : "zoom";
    const config = {
      responsive: true,
      displaylogo: false,
      displayModeBar: touch ? false : "hover",
      // plotly.js 4 would offer to send the figure to its makers' server: nothing leaves this page
      modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
      plotlyServerURL: "",
      toImageButtonOptions: { filename: name, scale: 2 },
    };
    return Plotly.react(name + "-plot", paint(data, style), layout, config);
  };

  const choose = (name, index) => {
    const spec = specs.get(name);
    spec.chosen = index;
    const note = document.getElementById(name + "-note");
    if (note) note.textContent = spec.choices[index].note;
    return draw(name);
  };

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const button = document.getElementById("theme");
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to the light theme" : "Switch to the dark theme");
  };
  const redraw = () => {
    label();
    for (const name of specs.keys()) draw(name);
  };

  for (const plot of document.querySelectorAll("[data-plot]")) {
    const name = plot.dataset.plot;
    specs.set(name, JSON.parse(document.getElementById(name + "-data").textContent));
  }
  for (const select of document.querySelectorAll("select[data-figure]")) {
    select.parentElement.hidden = false;
    select.addEventListener("change", () => choose(select.dataset.figure, Number(select.value)));
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });
  dark.addEventListener("change", redraw);

  // Paper is white, whatever the screen shows.
  let before;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    redraw();
  });
  window.addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    redraw();
  });

  // A click on a line or a cell shows the singular values of its module, in the same part of the page.
  const follow = (event, from) => {
    const part = /^p\d+-/.exec(from);
    const figure = (part ? part[0] : "") + "singular-values";
    const select = document.getElementById(figure + "-choice");
    const { data, customdata } = event.points[0];
    const named = typeof customdata === "string" ? customdata : data.meta;
    if (!select || typeof named !== "string") return;
    const name = named.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
    const index = [...select.options].findIndex((option) => option.text === name);
    if (index < 0) return;
    select.selectedIndex = index;
    choose(figure, index);
  };

  // One figure after the other, so that the page can be read and scrolled meanwhile.
  label();
  const waiting = [...specs.keys()];
  const next = () => {
    const name = waiting.shift();
    if (!name) return;
    draw(name).then((plot) => plot.on("plotly_click", (event) => follow(event, name)));
    setTimeout(next);
  };
  next();
})();
