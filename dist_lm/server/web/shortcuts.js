// Shortcuts: single keys where nothing is typed into, Escape and keys with Ctrl anywhere.

import {button, element} from "./dom.js";
import {load, save} from "./store.js";

const TYPED = "input, textarea, select, [contenteditable]";

export class Shortcuts {
  /** @param {() => {keys: string, words: string, run: () => void}[]} current the shortcuts of the moment */
  constructor(current, dialog) {
    this._current = current;
    this._dialog = dialog;
    this._isOn = load("shortcuts", true);
    document.addEventListener("keydown", (event) => this._press(event));
  }

  _press(event) {
    if (event.defaultPrevented || event.isComposing || event.altKey || event.metaKey) return;
    const name = event.ctrlKey ? `Ctrl+${event.key}` : event.key;
    const isSingle = !event.ctrlKey && event.key.length === 1;
    if (isSingle && (!this._isOn || event.target.closest(TYPED))) return;
    if (document.querySelector("dialog:modal")) return;
    const shortcut = this._current().find(({keys}) => keys.split(" ").includes(name));
    if (!shortcut) return;
    event.preventDefault();
    shortcut.run();
  }

  /** Opens the list of shortcuts. */
  help() {
    const rows = this._current().map(({keys, words}) => {
      const marks = keys.split(" ").map((key) => element("kbd", {}, key));
      return element("div", {}, element("dt", {}, ...marks), element("dd", {}, words));
    });
    const box = element("input", {
      type: "checkbox",
      checked: this._isOn,
      onchange: () => {
        this._isOn = box.checked;
        save("shortcuts", this._isOn);
      },
    });
    this._dialog.replaceChildren(
      element("h2", {id: "help-title"}, "Keys"),
      button("Close", "close", () => this._dialog.close(), {quiet: true, class: "icon-button close"}),
      element("dl", {class: "keys"}, ...rows),
      element("label", {class: "check"}, box, " single keys (turn off for speech input)"),
    );
    this._dialog.showModal();
  }
}
