"use strict";
// Maps of images: the one pointed at, touched or walked to is shown, and ringed in the other map of its projection.
(() => {
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const num = data.names.length;
  const byId = (id) => document.getElementById(id);
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isDark = () => variable("color-scheme") === "dark";
  const projections = [...new Set(data.panels.map((panel) => panel.projection))];
  const shown = data.groups.map(() => true);
  const still = window.matchMedia("(pointer: coarse)").matches;  // a finger scrolls the page, it zooms no map
  let projection = projections[0];
  let maps = [];
  let current = null;
  let kept = false;

  const colours = () => (isDark() ? data.dark : data.light);
  const ring = (panel) => ({
    type: "scatter", mode: "markers", hoverinfo: "skip", showlegend: false,
    x: current === null ? [] : [panel.x[current]], y: current === null ? [] : [panel.y[current]],
    marker: { size: 20, symbol: "circle-open", color: variable("--text"), line: { width: 3 } },
  });
  const dots = (panel) => ({
    type: "scatter", mode: "markers", x: panel.x, y: panel.y, hoverinfo: "none", showlegend: false,
    marker: {
      size: num > 1500 ? 6 : 9, symbol: data.number.map((group) => data.symbols[group]),
      color: data.number.map((group) => colours()[group]),
      opacity: data.number.map((group) => (shown[group] ? 0.85 : 0)), line: { width: 0 },
    },
  });
  const axis = () => ({ showgrid: false, zeroline: false, showticklabels: false, ticks: "" });
  const layout = () => ({
    paper_bgcolor: variable("--back"), plot_bgcolor: variable("--back"), margin: { l: 6, r: 6, t: 6, b: 6 },
    xaxis: axis(), yaxis: { ...axis(), scaleanchor: "x" },  // a distance is as long in one direction as in another
    hovermode: "closest", hoverdistance: 12, uirevision: projection, dragmode: still ? false : "zoom",
  });

  const draw = () => {
    for (const map of maps) {
      Plotly.react(map.plot, [dots(map.panel), ring(map.panel)], layout(),
        { responsive: true, displayModeBar: false, doubleClick: "reset" });
    }
  };

  const tell = () => {
    for (const map of maps) {
      const { x, y } = ring(map.panel);
      Plotly.restyle(map.plot, { x: [x], y: [y] }, [1]);
    }
    const thumb = byId("map-thumb");
    byId("map-card").classList.toggle("chosen", current !== null);
    if (current === null) {
      byId("map-text").textContent = "";
      return;
    }
    const column = current % data.columns, row = Math.floor(current / data.columns);
    const part = (place, count) => (count > 1 ? (100 * place) / (count - 1) : 0);
    thumb.style.backgroundImage = `url(${byId("map-sprite").src})`;
    thumb.style.backgroundSize = `${100 * data.columns}% ${100 * data.rows}%`;
    thumb.style.backgroundPosition = `${part(column, data.columns)}% ${part(row, data.rows)}%`;
    const label = data.labels[current];
    thumb.setAttribute("aria-label", label === null ? "image" : `image of class ${label}`);
    byId("map-text").textContent = `${label === null ? "" : `${label}: `}${data.names[current]}`;
  };

  const choose = (number, keep) => {
    current = number;
    kept = keep;
    tell();
  };

  // The nearest image that is shown and lies more in the direction of the arrow than beside it.
  const neighbour = (panel, dx, dy) => {
    let best = null, least = Infinity;
    for (let i = 0; i < num; i += 1) {
      if (!shown[data.number[i]] || i === current) continue;
      if (current === null) return i;
      const across = panel.x[i] - panel.x[current], up = panel.y[i] - panel.y[current];
      const along = across * dx + up * dy, beside = Math.abs(across * dy) + Math.abs(up * dx);
      const far = along + 2 * beside;
      if (along > 0 && along >= beside && far < least) { best = i; least = far; }
    }
    return best;
  };

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const walk = (event, panel) => {
    if (event.key === "Escape") { choose(null, false); return; }
    if (event.key === "Enter" && current !== null) { kept = !kept; return; }
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    const next = neighbour(panel, ...ARROWS[event.key]);
    if (next !== null) choose(next, true);
  };

  const build = () => {
    const grid = byId("map-panels");
    for (const map of maps) Plotly.purge(map.plot);
    grid.replaceChildren();
    maps = data.panels.filter((panel) => panel.projection === projection).map((panel) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      const plot = document.createElement("div");
      caption.textContent = `${panel.title}: ${panel.summary}`;
      plot.className = "map-plot";
      plot.tabIndex = 0;
      plot.setAttribute("role", "application");
      plot.setAttribute("aria-label", `${panel.projection}, ${panel.title}: arrow keys walk from image to image`);
      plot.addEventListener("keydown", (event) => walk(event, panel));
      figure.append(caption, plot);
      grid.append(figure);
      return { panel, plot };
    });
    byId("map-caution").textContent = maps[0].panel.caution;
    draw();
    for (const { plot } of maps) {
      const point = (event) => event.points.find((each) => each.curveNumber === 0 && shown[data.number[each.pointNumber]]);
      plot.on("plotly_hover", (event) => { const at = point(event); if (at && !kept) choose(at.pointNumber, false); });
      plot.on("plotly_click", (event) => { const at = point(event); if (at) choose(at.pointNumber, !(kept && at.pointNumber === current)); });
    }
    tell();
  };

  const SIGNS = {
    "circle": "<circle cx='8' cy='8' r='6'/>", "square": "<rect x='3' y='3' width='10' height='10'/>",
    "triangle-up": "<path d='M8 2 14 13H2z'/>", "diamond": "<path d='M8 1 15 8 8 15 1 8z'/>",
    "triangle-down": "<path d='M8 14 14 3H2z'/>", "cross": "<path d='M6 2h4v4h4v4h-4v4H6v-4H2V6h4z'/>",
    "x": "<path d='M4 1 8 5l4-4 3 3-4 4 4 4-3 3-4-4-4 4-3-3 4-4-4-4z'/>", "triangle-left": "<path d='M2 8 13 2v12z'/>",
    "triangle-right": "<path d='M14 8 3 2v12z'/>", "pentagon": "<path d='M8 1 15 6 12 14H4L1 6z'/>",
  };
  const legend = () => {
    const box = byId("map-classes");
    box.replaceChildren();
    if (data.groups.length < 2) return;
    const add = (sign, text, pressed, act) => {  // the sign is ours; the text may be anyone's
      const button = document.createElement("button");
      button.type = "button";
      button.innerHTML = sign;
      button.append(text);
      button.setAttribute("aria-pressed", String(pressed));
      button.addEventListener("click", act);
      box.append(button);
    };
    const refresh = (place) => {
      if (current !== null && !shown[data.number[current]]) choose(null, false);
      legend();
      draw();
      box.children[place].focus();
    };
    add("", "All", shown.every(Boolean), () => {
      const value = !shown.every(Boolean);
      shown.fill(value);
      refresh(0);
    });
    data.groups.forEach((name, group) => {
      const sign = `<svg viewBox='0 0 16 16' aria-hidden='true' fill='${colours()[group]}'>${SIGNS[data.symbols[group]]}</svg>`;
      add(sign, name, shown[group], () => {
        if (shown.every(Boolean)) shown.fill(false);  // the first choice is of one class alone
        shown[group] = !shown[group];
        if (!shown.some(Boolean)) shown.fill(true);
        refresh(group + 1);
      });
    });
  };

  const switches = () => {
    const box = byId("map-projections");
    box.replaceChildren();
    for (const name of projections.length > 1 ? projections : []) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.setAttribute("aria-pressed", String(name === projection));
      button.addEventListener("click", () => {
        projection = name;
        switches();
        build();
        box.querySelector("[aria-pressed=true]").focus();
      });
      box.append(button);
    }
  };

  switches();
  legend();
  build();
  document.addEventListener("themechange", () => { legend(); draw(); });
})();
