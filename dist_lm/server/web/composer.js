// The field for the next prompt, with its button: Enter sends, Shift+Enter begins a line, the button stops what runs.

import {element, grow, icon} from "./dom.js";

export class Composer {
  /**
   * @param {object} options {id, label, placeholder, value, words: of the button, onInput(text), onSend(), onStop()}
   */
  constructor(options) {
    this._options = options;
    this._isRunning = false;
    this.field = element("textarea", {
      id: options.id,
      rows: 1,
      placeholder: options.placeholder,
      "aria-label": options.label,
      "aria-describedby": options.describedBy,
      value: options.value,
      oninput: () => {
        grow(this.field);
        options.onInput(this.field.value);
      },
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        options.onSend();
      },
    });
    this._button = element("button", {type: "submit", class: "send"});
    const submit = (event) => {
      event.preventDefault();
      if (this._isRunning) options.onStop();
      else options.onSend();
    };
    this.node = element("form", {class: "composer", onsubmit: submit}, this.field, this._button);
    this.isRunning = false;
  }

  get text() {
    return this.field.value;
  }

  set text(text) {
    this.field.value = text;
    grow(this.field);
    this._options.onInput(text);
  }

  /** While something runs, the button stops it. */
  set isRunning(isRunning) {
    this._isRunning = isRunning;
    const words = isRunning ? "Stop" : this._options.words;
    this._button.replaceChildren(icon(isRunning ? "stop" : "send"), element("span", {}, words));
    this._button.classList.toggle("stops", isRunning);
  }

  get isConnected() {
    return this.node.isConnected;
  }
}
