"use strict";
// One choice of runs for all charts of curves. eval/pages/charts.js has drawn them with the curves of every run; from
// here on each has those of the chosen runs, and a run has one colour everywhere.
(() => {
  const box = document.getElementById("drawn");
  if (!box) return;
  const most = Number(box.dataset.most);
  const inputs = [...box.querySelectorAll("input[type=checkbox]")];
  const status = box.querySelector("[role=status]");
  const charts = window.pageCharts.all.filter((chart) => chart.figure.closest(".compared"));
  const curves = new Map(charts.map((chart) => [chart, new Map(chart.data.series.map((each) => [each.name, each]))]));
  const slots = new Array(most).fill(null);  // the run of each colour

  const free = () => slots.indexOf(null);
  const take = (run) => { if (!slots.includes(run) && free() >= 0) slots[free()] = run; };
  const leave = (run) => { if (slots.includes(run)) slots[slots.indexOf(run)] = null; };

  const show = () => {
    const drawn = slots.filter((run) => run !== null);
    for (const input of inputs) {
      const slot = slots.indexOf(input.value);
      input.checked = slot >= 0;
      input.disabled = slot < 0 && free() < 0;
      const swatch = input.parentElement.querySelector(".swatch");
      swatch.hidden = slot < 0;
      swatch.style.borderTopColor = `var(--c${slot % 8})`;
      swatch.style.borderTopStyle = slot >= 8 ? "dashed" : "solid";
    }
    status.textContent = `${drawn.length} of ${inputs.length} runs are drawn` +
      (free() < 0 && drawn.length < inputs.length ? "; untick one to draw another" : "");
    for (const chart of charts) {
      const own = curves.get(chart);
      chart.data.series = slots.flatMap((run, slot) => own.has(run) ? [{ ...own.get(run), slot }] : []);
      chart.shown = chart.data.series.map(() => true);
      const title = chart.figure.querySelector("figcaption b").textContent;
      chart.plot.setAttribute("aria-label", `${title}, a line chart of ` +
        (chart.data.series.map((each) => each.name).join(", ") || "no run") + "; its numbers are in the table below");
    }
    if (charts.length) window.pageCharts.axis(charts[0].axis);  // draws them again, with their tables
  };

  for (const input of inputs) {
    input.addEventListener("change", () => {
      if (input.checked) take(input.value);
      else leave(input.value);
      show();
    });
  }

  const choose = (runs) => { slots.fill(null); runs.slice(0, most).forEach(take); show(); };
  const inTable = () => {
    const known = new Set(inputs.map((input) => input.value));
    const rows = [...document.querySelectorAll("#runs-table tbody tr")].filter((row) => !row.hidden);
    return rows.map((row) => row.dataset.key).filter((run) => known.has(run));
  };
  box.querySelector("[data-draw=table]")?.addEventListener("click", () => choose(inTable()));
  box.querySelector("[data-draw=none]")?.addEventListener("click", () => choose([]));
  box.querySelector("input[type=search]")?.addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const input of inputs) {
      input.parentElement.hidden = !words.every((word) => input.value.toLowerCase().includes(word));
    }
  });

  choose(inputs.filter((input) => input.defaultChecked).map((input) => input.value));
})();
