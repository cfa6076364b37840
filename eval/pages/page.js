"use strict";
// The switch between dark and light, and buttons that copy. A page from the disk may have no storage and no clipboard.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = isDark() ? "Light colours" : "Dark colours";
    document.dispatchEvent(new Event("themechange"));
  };
  try {
    const kept = localStorage.getItem("theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch (error) { /* no storage here: the system's choice stands */ }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch (error) { /* it lasts until the page is closed */ }
    show();
  });
  system.addEventListener("change", show);
  show();

  // <button data-copy="id">: copies the text of the element with that id.
  for (const copy of document.querySelectorAll("button[data-copy]")) {
    const label = copy.textContent;
    copy.addEventListener("click", async () => {
      const source = document.getElementById(copy.dataset.copy);
      let done = false;
      try {
        await navigator.clipboard.writeText(source.textContent);
        done = true;
      } catch (error) {  // not a secure context, as some browsers see file://: select it, and copy the selection
        const range = document.createRange();
        range.selectNodeContents(source);
        const selection = window.getSelection();
        selection.removeAllRanges();
        selection.addRange(range);
        try { done = document.execCommand("copy"); } catch (refused) { done = false; }
      }
      copy.textContent = done ? "Copied" : "Selected: press Ctrl+C";
      setTimeout(() => { copy.textContent = label; }, 2500);
    });
  }
})();
