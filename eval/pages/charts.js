"use strict";
// Draws every <figure class="chart"> from the JSON beside it. No animation; colours are the page's variables.
(() => {
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const SIGNS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const charts = [];
  let axis = null;  // chosen for all charts; null: each chart's first

  // A curve keeps its colour where others come and go: `slot`, else its place.
  const slot = (item, i) => item.slot === undefined ? i : item.slot;

  const layout = (chart) => {
    const text = colour("--text"), line = colour("--line"), narrow = chart.plot.clientWidth < 420;
    const one = (title) => ({
      title: { text: title, standoff: 6 }, gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true,
      exponentformat: "power",
      nticks: narrow ? 5 : 9,
    });
    const made = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { color: text, size: 12, family: "system-ui, sans-serif" },
      margin: { l: 52, r: 14, t: 8, b: 42 }, hovermode: "closest", dragmode: narrow ? false : "zoom",
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: line, font: { color: text } },
      xaxis: one(chart.kind === "lines" ? chart.data.x[chart.axis] : chart.data.x), yaxis: one(chart.data.y),
      shapes: [],
    };
    made.yaxis.title = undefined;  // the caption says it
    if (chart.kind === "scatter") made.yaxis.title = { text: chart.data.y, standoff: 6 };
    if (chart.log) made.yaxis.type = "log";
    if (chart.data.log_x) made.xaxis.type = "log";
    if (["step", "images"].includes(chart.axis)) made.xaxis.exponentformat = "SI";  // 2M, which hours would not be
    if (chart.data.percent) Object.assign(made.yaxis, { tickformat: ".3~%", rangemode: "nonnegative" });
    const alone = chart.kind === "lines" && chart.data.series.every((series) => series.y.length < 2);
    if (alone) made.yaxis.rangemode = "tozero";  // else the axis would magnify the digits of one number
    if (chart.kind === "lines") {
      made.yaxis2 = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
      for (const mark of chart.data.marks) {
        if (mark.kind !== "resume") continue;
        made.shapes.push({
          type: "line", xref: "x", yref: "paper", x0: mark.x[chart.axis], x1: mark.x[chart.axis], y0: 0, y1: 1,
          line: { color: colour("--soft"), width: 1, dash: "dash" },
        });
      }
    }
    return made;
  };

  const traces = (chart) => {
    if (chart.kind === "scatter") {
      return chart.data.groups.map((group, i) => ({
        type: "scatter", mode: "markers", name: group.name, x: group.x, y: group.y, text: group.text.map(safe),
        hovertemplate: "%{text}<br>" + chart.data.x.replace(/[<>&%]/g, "") + " %{x}, %{y}<extra></extra>",
        visible: chart.shown[i],
        marker: { color: colour(`--c${i % 8}`), symbol: SIGNS[i % 8], size: 7 },
      }));
    }
    const lines = chart.data.series.map((series, i) => ({
      type: "scatter", mode: series.y.length > 60 ? "lines" : "lines+markers", name: safe(series.name),
      x: series.x[chart.axis], y: series.y, visible: chart.shown[i], connectgaps: true,
      hovertemplate: `%{x:~r}: %{y:.4~g}<extra>${safe(series.name)}</extra>`,
      line: {
        color: colour(`--c${slot(series, i) % 8}`), width: 1.8,
        dash: series.dash ? "dash" : DASHES[Math.floor(slot(series, i) / 8) % 5],
      },
      marker: { size: series.y.length < 2 ? 9 : 4 }, cliponaxis: series.y.length > 1,
    }));
    for (const [kind, symbol, paint] of [["resume", "triangle-up", "--soft"], ["skipped", "x", "--bad"]]) {
      const marks = chart.data.marks.filter((mark) => mark.kind === kind);
      if (!marks.length) continue;
      lines.push({
        type: "scatter", mode: "markers", yaxis: "y2", cliponaxis: false, x: marks.map((mark) => mark.x[chart.axis]),
        y: marks.map(() => 0.02), text: marks.map((mark) => safe(mark.label)),
        hovertemplate: "%{text}<extra></extra>", marker: { symbol, size: 9, color: colour(paint) },
      });
    }
    return lines;
  };

  // plotly reads a few tags and its own placeholders in texts: names from files are shown as they are.
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
    .replace(/%\{/g, "% {");

  const draw = (chart) => Plotly.react(chart.plot, traces(chart), layout(chart),
    { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false });

  const names = (chart) => {
    const items = chart.kind === "lines" ? chart.data.series : chart.data.groups;
    const box = chart.figure.querySelector(".names");
    if (items.length < 2) return;
    items.forEach((item, i) => {
      const button = document.createElement("button");
      button.type = "button";
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.borderTopColor = `var(--c${i % 8})`;
      swatch.style.borderTopStyle = item.dash || (i >= 8 && chart.kind === "lines") ? "dashed" : "solid";
      button.append(swatch, item.name);
      const press = () => button.setAttribute("aria-pressed", String(chart.shown[i]));
      button.addEventListener("click", () => { chart.shown[i] = !chart.shown[i]; press(); draw(chart); });
      press();
      box.append(button);
    });
  };

  const table = (chart) => {
    const box = chart.figure.querySelector(".table");
    if (box.firstChild) return;
    const made = document.createElement("table");
    const row = (cells, tag) => {
      const tr = document.createElement("tr");
      for (const cell of cells) {
        const td = document.createElement(tag);
        td.textContent = cell === null || cell === undefined ? "" : String(cell);
        if (typeof cell === "number") td.className = "number";
        tr.append(td);
      }
      return tr;
    };
    const head = document.createElement("thead"), body = document.createElement("tbody");
    if (chart.kind === "scatter") {
      head.append(row(["group", chart.data.x, chart.data.y, ""], "th"));
      for (const group of chart.data.groups) {
        group.x.forEach((x, i) => body.append(row([group.name, x, group.y[i], group.text[i]], "td")));
      }
    } else {
      head.append(row([chart.data.x[chart.axis], ...chart.data.series.map((series) => series.name)], "th"));
      const rows = new Map();
      chart.data.series.forEach((series, column) => series.x[chart.axis].forEach((x, i) => {
        if (!rows.has(x)) rows.set(x, new Array(chart.data.series.length).fill(null));
        rows.get(x)[column] = series.y[i];
      }));
      for (const x of [...rows.keys()].sort((a, b) => a - b)) body.append(row([x, ...rows.get(x)], "td"));
    }
    made.append(head, body);
    box.append(made);
  };

  const start = (figure) => {
    const data = JSON.parse(document.getElementById(`${figure.id}-data`).textContent);
    const chart = { figure, data, kind: figure.dataset.kind, plot: figure.querySelector(".plot") };
    const items = chart.kind === "lines" ? data.series : data.groups;
    chart.shown = items.map((item) => item.visible !== false);
    chart.axis = chart.kind === "lines" ? Object.keys(data.x)[0] : null;
    const button = figure.querySelector("button.log");
    chart.log = button !== null && button.getAttribute("aria-pressed") === "true";
    if (button) {
      button.disabled = !data.series.some((series) => series.y.some((y) => y > 0));
      button.addEventListener("click", () => {
        chart.log = !chart.log;
        button.setAttribute("aria-pressed", String(chart.log));
        draw(chart);
      });
    }
    const details = figure.querySelector("details.data");
    details.addEventListener("toggle", () => { if (details.open) table(chart); });
    names(chart);
    charts.push(chart);
    draw(chart);
  };

  // For scripts of other pages: draw what was added later, or draw all again after its data changed.
  window.pageCharts = {
    start, all: charts,
    redraw: (id) => charts.filter((chart) => chart.figure.id === id).forEach(draw),
    axis: (name) => {
      for (const chart of charts) {
        if (chart.kind !== "lines" || !(name in chart.data.x)) continue;
        chart.axis = name;
        chart.figure.querySelector(".table").replaceChildren();
        if (chart.figure.querySelector("details.data").open) table(chart);
        draw(chart);
      }
    },
  };
  document.querySelectorAll("figure.chart").forEach(start);
  document.addEventListener("themechange", () => charts.forEach(draw));
  const switches = document.querySelectorAll("button[data-x]");
  for (const button of switches) {
    button.addEventListener("click", () => {
      switches.forEach((other) => other.setAttribute("aria-pressed", String(other.dataset.x === button.dataset.x)));
      window.pageCharts.axis(button.dataset.x);
    });
  }
})();
