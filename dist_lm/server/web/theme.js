"use strict";
// Sets light or dark before the page is drawn; without a choice the page follows the preference of the system.
{
  let theme = null;
  try {
    theme = localStorage.getItem("dist_lm.theme");
  } catch {
    // Storage is switched off: the preference of the system is followed.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
