// Makes elements. Text of a model or of a user only ever becomes text nodes and attributes that hold no code.

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "open", "selected"]);
const SVG = "http://www.w3.org/2000/svg";
const PATHS = {
  menu: "M4 6h16M4 12h16M4 18h16",
  settings: "M4 7h9M19 7h1M4 17h1M11 17h9M16 4.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5ZM8 14.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5Z",
  help: "M9.2 9a3 3 0 1 1 4.3 2.7c-1 .5-1.5 1-1.5 2.1M12 17.5v.1M12 3a9 9 0 1 1 0 18 9 9 0 0 1 0-18Z",
  key: "M14.5 4.5a5 5 0 1 1-4 8L9 14H7v2H5v2H3v-3l6-6a5 5 0 0 1 5.500-4.500ZM16 8.500v.1",
  sun: "M12 8a4 4 0 1 1 0 8 4 4 0 0 1 0-8ZM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.400 1.400M17.600 17.600 19 19M5 19l1.400-1.400M17.600 6.400 19 5",
  moon: "M20 14.500A8.500 8.500 0 0 1 9.500 4a8.500 8.500 0 1 0 10.500 10.500Z",
  close: "M6 6l12 12M18 6 6 18",
  plus: "M12 5v14M5 12h14",
  edit: "M4 20h4L19 9l-4-4L4 16ZM13 7l4 4",
  copy: "M9 9h11v11H9ZM15 9V4H4v11h5",
  again: "M20 11a8 8 0 1 0-2.300 6.500M20 5v6h-6",
  fork: "M6 4v7a4 4 0 0 0 4 4h8M6 20v-9M14 11l4 4-4 4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  send: "M12 20V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7Z",
  tool: "M14 7a4 4 0 0 1 5.500-3.700L17 6l1 1 2.700-2.500A4 4 0 0 1 15.500 10L8 17.500A2.100 2.100 0 0 1 5 14.500L12.500 7",
  download: "M12 4v11M7 10l5 5 5-5M5 20h14",
  check: "M5 12.500l4.500 4.500L19 7",
};

/** Returns a new element. Attributes `onclick`, `oninput` and so on are listeners, and need functions. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Returns a drawing that screen readers pass over: its button has the words. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  drawing.setAttribute("class", "icon");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  drawing.append(path);
  return drawing;
}

/** Returns a button with an icon and words; `attributes.key` names it, so that it keeps the focus over a redraw. */
export function button(words, iconName, onclick, {quiet = false, key, ...attributes} = {}) {
  return element(
    "button",
    {
      type: "button",
      onclick,
      "aria-label": quiet ? words : null,
      title: quiet ? words : null,
      "data-focus": key,
      ...attributes,
    },
    iconName ? icon(iconName) : null,
    quiet ? null : element("span", {}, words),
  );
}

/** Gives a button of the page's frame its icon and its words. */
export function dressButton(node, iconName, words) {
  node.replaceChildren(icon(iconName));
  node.setAttribute("aria-label", words);
  node.title = words;
}

/**
 * Redraws a part of the page. What had the focus gets it again, if something of its `data-focus` or its id is still
 * there, and a field of text its selection.
 */
export function redraw(container, draw) {
  const before = container.contains(document.activeElement) ? document.activeElement : null;
  draw();
  if (!before || container.contains(document.activeElement)) return;

  const {id, dataset: {focus: key}} = before;
  const selector = key ? `[data-focus="${CSS.escape(key)}"]` : `#${CSS.escape(id)}`;
  const after = key || id ? container.querySelector(selector) : null;
  after?.focus({preventScroll: true});
  if (after?.matches("textarea")) after.setSelectionRange(before.selectionStart, before.selectionEnd);
}

/** Says a text to a screen reader. */
export function announce(text) {
  const live = document.getElementById("live");
  live.textContent = "";
  // A region that gets the same text twice says it once, so it is emptied for a moment.
  setTimeout(() => (live.textContent = text), 50);
}

/** Returns a box with an error in words, and buttons that help. */
export function errorBox(message, ...actions) {
  return element("div", {class: "notice error", role: "alert"}, element("p", {}, message), ...actions);
}

/** Makes a text area as high as its text, up to the limit of its style. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

/** Copies a text, also where the page has no secure origin (http on another machine), and says so. */
export async function copyText(text) {
  let copied = false;
  try {
    await navigator.clipboard.writeText(text);
    copied = true;
  } catch {
    const active = document.activeElement;
    const area = element("textarea", {class: "only-heard", value: text, "aria-hidden": "true"});
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
    active?.focus();
  }
  announce(copied ? "Copied" : "The browser does not allow copying");
  return copied;
}

/** Saves a text as a file. */
export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], {type}));
  const link = element("a", {href: address, download: name, class: "only-heard"});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
