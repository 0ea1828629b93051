// Puts the page together: the views, the panels beside them, and what they share.

import {Api} from "./api.js";
import {ChatView} from "./chat.js";
import {CompareView} from "./compare.js";
import {announce, button, dressButton, element, errorBox, redraw} from "./dom.js";
import {Drawer} from "./drawer.js";
import {InfillView} from "./infill.js";
import {drawSettings} from "./settings.js";
import {Shortcuts} from "./shortcuts.js";
import {deleteConversation, load, loadConversations, save, saveConversation} from "./store.js";
import {newConversation} from "./tree.js";

const VIEWS = {chat: ChatView, compare: CompareView, infill: InfillView};
const get = (id) => document.getElementById(id);

/** What the views share. */
class App {
  constructor() {
    this.api = new Api();
    this.models = [];
    this.settings = load("settings", {});
    this.conversations = loadConversations();
    this.conversation = this.conversations.find(({id}) => id === load("open", "")) ?? newConversation();
    this._draft = load("draft", "");
    this._settingsDrawer = new Drawer(get("settings"), get("open-settings"), "(min-width: 1100px)");
    this._listDrawer = new Drawer(get("conversations"), get("open-conversations"), "(min-width: 800px)");
    this._views = Object.fromEntries(Object.entries(VIEWS).map(([name, View]) => [name, new View(this)]));
    this._shortcuts = new Shortcuts(() => this._currentShortcuts(), get("help-dialog"));
  }

  get draft() {
    return this._draft;
  }

  set draft(text) {
    this._draft = text;
    save("draft", text);
  }

  /** Draws the page, then asks for the models. */
  async start() {
    this._dressFrame();
    this._showView();
    window.addEventListener("hashchange", () => this._showView());
    // Another tab may have changed the list; the conversation that is open here stays as it is here.
    window.addEventListener("storage", () => {
      const here = new Map([...this.conversations, this.conversation].map((each) => [each.id, each]));
      this.conversations = loadConversations().map((stored) => {
        const known = here.get(stored.id);
        return known && (known === this.conversation || known.updated >= stored.updated) ? known : stored;
      });
      this._drawList();
    });
    await this.loadModels();
  }

  _dressFrame() {
    dressButton(get("open-conversations"), "menu", "Conversations");
    dressButton(get("open-settings"), "settings", "Settings");
    dressButton(get("open-help"), "help", "Keys (?)");
    dressButton(get("open-key"), "key", "Key of the server");
    get("open-help").addEventListener("click", () => this._shortcuts.help());
    get("open-key").addEventListener("click", () => this.askKey());
    get("switch-theme").addEventListener("click", () => this._switchTheme());
    get("model").addEventListener("change", (event) => {
      this.settings.model = event.target.value;
      this.saveSettings();
    });
    this._dressTheme();
  }

  // Light and dark

  get _isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  }

  _switchTheme() {
    const theme = this._isDark ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem("dist_lm.theme", theme);
    } catch {
      // Storage is switched off: the choice lives as long as the page.
    }
    this._dressTheme();
  }

  _dressTheme() {
    dressButton(get("switch-theme"), this._isDark ? "sun" : "moon", this._isDark ? "Light colours" : "Dark colours");
  }

  // Views

  get _current() {
    return this._views[this.view];
  }

  _showView() {
    const name = location.hash.slice(1);
    this.view = name in VIEWS ? name : "chat";
    for (const link of document.querySelectorAll(".views a")) {
      if (link.hash === `#${this.view}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    document.body.dataset.view = this.view;
    this._current.draw(get("view"));
    drawSettings(this._settingsDrawer, this);
    this._drawList();
  }

  _currentShortcuts() {
    return [
      ...this._current.shortcuts,
      {keys: "1", words: "chat", run: () => (location.hash = "#chat")},
      {keys: "2", words: "compare", run: () => (location.hash = "#compare")},
      {keys: "3", words: "infill", run: () => (location.hash = "#infill")},
      {keys: "s", words: "settings", run: () => this._settingsDrawer.toggle()},
      {keys: "l", words: "list of conversations", run: () => this._listDrawer.toggle()},
      {keys: "d", words: "dark or light", run: () => this._switchTheme()},
      {keys: "?", words: "this list", run: () => this._shortcuts.help()},
    ];
  }

  // Models and key

  modelNamed(name) {
    return this.models.find(({id}) => id === name);
  }

  async loadModels() {
    try {
      this.models = await this.api.models();
    } catch (error) {
      if (error.status === 401) {
        get("open-key").hidden = false;
        this.askKey();
      } else {
        this._announceTrouble(error.message);
      }
      return;
    }
    get("open-key").hidden = !this.api.key;
    if (!this.modelNamed(this.settings.model)) this.settings.model = this.models[0]?.id;
    const options = this.models.map(({id}) => element("option", {value: id, selected: id === this.settings.model}, id));
    get("model").replaceChildren(...options);
    get("trouble")?.remove();
    // Somebody may be writing by now, as after a key was given.
    redraw(get("view"), () => this._current.draw(get("view")));
    document.documentElement.dataset.ready = "";
  }

  _announceTrouble(message) {
    get("trouble")?.remove();
    const box = errorBox(message, button("Try again", "again", () => this.loadModels()));
    box.id = "trouble";
    document.querySelector(".bar").after(box);
  }

  /** Asks for the key of the server. */
  askKey() {
    const dialog = get("key-dialog");
    const field = element("input", {
      type: "password",
      id: "key",
      autocomplete: "off",
      value: this.api.key,
      pattern: "[ -~]*", // what a header can hold
      title: "letters, digits and marks of ASCII",
    });
    const give = async (key) => {
      dialog.close();
      this.api.key = key;
      await this.loadModels();
    };
    const form = element(
      "form",
      {onsubmit: (event) => {
        event.preventDefault();
        give(field.value.trim());
      }},
      element("h2", {id: "key-title"}, "Key of the server"),
      element("p", {}, "The server asks for its key (DIST_LM_API_KEY). The page keeps it until this tab is closed."),
      element("label", {class: "wide-field", for: "key"}, element("span", {class: "label"}, "Key"), field),
      element(
        "div",
        {class: "row"},
        element("button", {type: "submit", class: "primary"}, "Use this key"),
        this.api.key ? button("Forget it", "trash", () => give("")) : "",
        button("Cancel", null, () => dialog.close()),
      ),
    );
    dialog.replaceChildren(form);
    if (!dialog.open) dialog.showModal();
    field.focus();
  }

  // Settings and conversations

  saveSettings() {
    save("settings", this.settings);
  }

  /** Keeps a conversation; says so where there is no space. */
  saveConversation(conversation) {
    if (!Object.keys(conversation.turns).length) return;
    if (!saveConversation(conversation)) {
      this._announceTrouble("The browser has no space for this conversation: it is lost at a reload.");
    }
    save("open", this.conversation.id);
    this.conversations = [conversation, ...this.conversations.filter(({id}) => id !== conversation.id)];
    this._drawList();
  }

  /** Shows a conversation, which may be new. */
  open(conversation) {
    this.conversation = conversation;
    save("open", conversation.id);
    this.saveConversation(conversation);
    this._listDrawer.hideIfOver();
    if (this.view === "chat") this._showView();
    else location.hash = "#chat";
  }

  openNew() {
    const {system, tools, toolChoice, parallelCalls} = this.conversation;
    this.open({...newConversation(), system, tools, toolChoice, parallelCalls});
    get("composer")?.focus();
    announce("New conversation");
  }

  /** The title of the open conversation may be new. */
  conversationChanged() {
    document.title = this.conversation.title ? `${this.conversation.title} · dist_lm` : "dist_lm";
  }

  _drawList() {
    const items = this.conversations.map((conversation) => {
      const isOpen = conversation.id === this.conversation.id;
      const open = element("button", {
        type: "button",
        class: "title",
        "aria-current": isOpen ? "true" : null,
        onclick: () => this.open(conversation),
      }, conversation.title || "Without a title");
      const remove = button(`Delete ${conversation.title}`, "trash", () => this._delete(conversation, remove), {
        quiet: true,
        class: "icon-button small",
      });
      return element("li", {}, open, remove);
    });
    const close = button("Close conversations", "close", () => this._listDrawer.hide(), {
      quiet: true,
      class: "icon-button close",
    });
    const none = element("p", {class: "muted"}, "What you talk about is kept in this browser.");
    this._listDrawer.node.replaceChildren(
      element("h2", {class: "only-heard"}, "Conversations"),
      element(
        "div",
        {class: "row"},
        button("New", "plus", () => this.openNew(), {class: "primary new"}),
        close,
      ),
      items.length ? element("ul", {}, ...items) : none,
    );
  }

  _delete(conversation, pressed) {
    // The second press deletes.
    if (!pressed.dataset.sure) {
      pressed.dataset.sure = "1";
      const drawing = pressed.firstChild;
      pressed.replaceChildren("Delete?");
      const relent = () => {
        delete pressed.dataset.sure;
        pressed.replaceChildren(drawing);
      };
      pressed.addEventListener("blur", relent, {once: true});
      return;
    }
    deleteConversation(conversation.id);
    this.conversations = this.conversations.filter((other) => other !== conversation);
    if (conversation === this.conversation) {
      this.conversation = newConversation();
      if (this.view === "chat") this._showView();
    }
    this._drawList();
    this._listDrawer.node.querySelector(".new").focus();
    announce("Deleted");
  }
}

new App().start();
