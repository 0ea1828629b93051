// The view for text in the middle: what stands before and after is given, the model writes what is between.

import {factsOf, newAnswer, samplingOf, streamCompletion} from "./answer.js";
import {announce, button, copyText, element, errorBox} from "./dom.js";
import {load, save} from "./store.js";
import {tokenView} from "./tokens.js";

const NAME = "infill";

export class InfillView {
  constructor(app) {
    this._app = app;
    const kept = load(NAME, {});
    this._prefix = kept.prefix ?? "";
    this._suffix = kept.suffix ?? "";
    this._answer = kept.answer ?? null;
    this._showsTokens = false;
    this._controller = null;
  }

  get isRunning() {
    return this._controller !== null;
  }

  _save() {
    const answer = this._answer && {...this._answer, promptIds: undefined};
    save(NAME, {prefix: this._prefix, suffix: this._suffix, answer});
  }

  draw(container) {
    const area = (id, name, value, set) =>
      element("textarea", {id, class: "code-area", spellcheck: "false", value, "aria-label": name, placeholder: name, oninput: (event) => {
        set(event.target.value);
        this._save();
      }, onkeydown: (event) => {
        if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
        event.preventDefault();
        this.fill();
      }});
    this._prefixArea = area("infill-prefix", "Text before the gap", this._prefix, (text) => (this._prefix = text));
    this._suffixArea = area("infill-suffix", "Text after the gap", this._suffix, (text) => (this._suffix = text));
    this._middle = element("div", {class: "middle", role: "region", "aria-label": "The middle"});
    this._buttons = element("div", {class: "row"});
    container.replaceChildren(
      element("h2", {class: "only-heard"}, "Fill in the middle"),
      element(
        "div",
        {class: "infill"},
        element("label", {class: "label", for: "infill-prefix"}, "Before"),
        this._prefixArea,
        this._middle,
        element("label", {class: "label", for: "infill-suffix"}, "After"),
        this._suffixArea,
      ),
      element("div", {class: "foot"}, this._buttons),
    );
    this._drawMiddle();
    this._drawButtons();
  }

  _drawMiddle() {
    const answer = this._answer;
    this._middle.setAttribute("aria-busy", String(this.isRunning));
    if (!answer) {
      this._middle.replaceChildren(element("p", {class: "muted"}, "Here the model writes what fits between the two texts (Ctrl+Enter)."));
      return;
    }
    let content = element("pre", {class: "written", tabindex: "0"}, answer.content);
    if (!answer.content && !this.isRunning && !answer.error) content = element("p", {class: "muted"}, "(nothing)");
    if (this._showsTokens && !this.isRunning) content = tokenView(answer.tokens);
    const facts = this.isRunning ? "writing" : factsOf(answer).join(" · ");
    this._middle.replaceChildren(
      content,
      answer.error ? errorBox(answer.error) : "",
      element("p", {class: "facts"}, facts),
    );
  }

  _drawButtons() {
    if (this.isRunning) {
      this._buttons.replaceChildren(button("Stop", "stop", () => this.stop(), {class: "stops"}));
      return;
    }
    const hasText = Boolean(this._answer?.content);
    this._buttons.replaceChildren(
      button(this._answer ? "Fill in again" : "Fill in", "again", () => this.fill(), {class: "primary", id: "fill-in"}),
      hasText ? button("Take it", "check", () => this._take(), {title: "Put the middle at the end of the text before"}) : "",
      hasText ? button("Copy", "copy", () => copyText(this._answer.content)) : "",
      this._answer?.tokens?.length ? button(this._showsTokens ? "Text" : "Tokens", null, () => this._flip()) : "",
    );
  }

  _flip() {
    this._showsTokens = !this._showsTokens;
    this._drawMiddle();
    this._drawButtons();
  }

  _take() {
    this._prefix += this._answer.content;
    this._prefixArea.value = this._prefix;
    this._answer = null;
    this._save();
    this._drawMiddle();
    this._drawButtons();
    this._prefixArea.focus();
    this._prefixArea.setSelectionRange(this._prefix.length, this._prefix.length);
    announce("The middle stands at the end of the text before the gap");
  }

  stop() {
    this._controller?.abort();
  }

  /** Asks for the middle. */
  async fill() {
    if (this.isRunning) return;
    const {settings} = this._app;
    const body = {model: settings.model, prompt: this._prefix, suffix: this._suffix, ...samplingOf(settings)};
    const answer = newAnswer(body);
    this._answer = answer;
    this._controller = new AbortController();
    this._drawMiddle();
    this._drawButtons();
    await streamCompletion(this._app.api, body, answer, this._controller.signal, () => {
      if (this._middle.firstChild?.matches?.("pre")) this._middle.firstChild.textContent = answer.content;
    });
    this._controller = null;
    if (answer.status === 401) this._app.askKey();
    this._save();
    if (!this._middle.isConnected) return;
    this._drawMiddle();
    this._drawButtons();
    announce(answer.error ?? `The middle: ${answer.content || "nothing"}`);
  }

  get shortcuts() {
    return [
      {keys: "/", words: "write the text before the gap", run: () => this._prefixArea.focus()},
      {keys: "Ctrl+Enter r", words: "fill in", run: () => this.fill()},
      {keys: "Escape", words: "stop", run: () => this.stop()},
      {keys: "t", words: "tokens by probability", run: () => this._flip()},
    ];
  }
}
