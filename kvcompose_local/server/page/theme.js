// Before the first paint, so that a dark page does not flash white. A classic script: modules run later.
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is blocked: as the system says
}
