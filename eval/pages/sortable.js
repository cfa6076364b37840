// Tables that sort, filter and hide columns. Each is a .sortable of eval/pages/sortable.py; one whose rows or their
// order changed says so by the event "rows".
(() => {
  "use strict";
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

  const valueOf = (cell) => {
    if (cell.dataset.number !== undefined) return Number(cell.dataset.number);
    return cell.dataset.text === undefined ? null : cell.dataset.text;
  };

  // Numbers before texts, texts with the numbers in them as numbers.
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a < b ? -1 : a > b ? 1 : 0;
    if (typeof a === "number") return -1;
    return typeof b === "number" ? 1 : collator.compare(a, b);
  };

  const sort = (table, column, direction) => {
    const keyed = [...table.tBodies[0].rows].map((row) => ({ row, value: valueOf(row.cells[column]) }));
    keyed.sort((a, b) => {  // stable: equal rows stay as they were
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
      return direction * compare(a.value, b.value);
    });
    table.tBodies[0].append(...keyed.map(({ row }) => row));
    [...table.tHead.rows[0].cells].forEach((head, place) => {
      if (place !== column) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    });
  };

  const filter = (rows, words) => {
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  };

  const start = (box) => {
    const table = box.querySelector("table");
    const status = box.querySelector("[role=status]");
    const rows = [...table.tBodies[0].rows];
    const tell = () => box.dispatchEvent(new Event("rows"));
    box.querySelector(".sortable-tools").hidden = false;

    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        sort(table, column, direction);
        status.textContent = `sorted by ${head.querySelector("button").textContent}, ` +
          `${direction > 0 ? "ascending" : "descending"}`;
        tell();
      });
    });

    const search = box.querySelector("input[type=search]");
    if (search) {
      search.addEventListener("input", () => {
        filter(rows, search.value.toLowerCase().split(/\s+/).filter(Boolean));
        status.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
        tell();
      });
    }

    for (const choice of box.querySelectorAll("input[data-column]")) {
      const column = Number(choice.dataset.column);
      choice.addEventListener("change", () => {
        for (const row of table.rows) row.cells[column].hidden = !choice.checked;
      });
    }
  };

  for (const box of document.querySelectorAll(".sortable")) start(box);
})();
