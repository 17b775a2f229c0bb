// Before anything is drawn: the colours that the reader chose, or those of the system.
(() => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const kept = () => { try { return localStorage.getItem("mfdist-theme"); } catch { return null; } };
  let choice = ["light", "dark"].includes(kept()) ? kept() : "auto";
  const apply = () => { root.dataset.theme = choice === "auto" ? (dark.matches ? "dark" : "light") : choice; };
  const changed = () => { apply(); document.dispatchEvent(new Event("theme")); };
  apply();
  dark.addEventListener("change", changed);
  window.reportTheme = {
    get choice() { return choice; },
    next() {
      choice = { auto: "light", light: "dark", dark: "auto" }[choice];
      try { localStorage.setItem("mfdist-theme", choice); } catch { /* a file may have no storage */ }
      changed();
    },
    isPrinting: false,
    print(isPrinting) {
      this.isPrinting = isPrinting;
      if (isPrinting) root.dataset.theme = "light"; else apply();
      document.dispatchEvent(new Event("theme"));
    },
  };
})();
