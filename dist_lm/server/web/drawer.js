// A panel at the side: beside the view where there is space, and over it, with the focus inside, where there is not.

import {load, save} from "./store.js";

export class Drawer {
  /**
   * @param {HTMLDialogElement} node
   * @param {HTMLButtonElement} opener which shows and hides it
   * @param {string} wide media query: there is space beside the view
   */
  constructor(node, opener, wide) {
    this.node = node;
    this._opener = opener;
    this._wide = window.matchMedia(wide);
    this._isWanted = load(`drawer.${node.id}`, true);
    opener.addEventListener("click", () => this.toggle());
    node.addEventListener("close", () => this._tell());
    node.addEventListener("click", (event) => {
      if (event.target === node && node.matches(":modal")) this.hide(); // a click beside the panel
    });
    this._wide.addEventListener("change", () => this._lay());
    this._lay();
  }

  get isShown() {
    return this.node.open;
  }

  toggle() {
    if (this.isShown) this.hide();
    else this.show();
  }

  show() {
    if (this._wide.matches) {
      this._want(true);
      this.node.open = true; // show() would take the focus
    } else {
      this.node.showModal();
    }
    this._tell();
  }

  hide() {
    const hadFocus = this.node.contains(document.activeElement);
    if (this._wide.matches) this._want(false);
    if (this.node.matches(":modal")) this.node.close();
    this.node.open = false;
    if (hadFocus) this._opener.focus();
    this._tell();
  }

  /** Hides a panel that lies over the view; one beside it stays. */
  hideIfOver() {
    if (this.node.matches(":modal")) this.hide();
  }

  _lay() {
    if (this.node.matches(":modal")) this.node.close();
    this.node.open = this._wide.matches && this._isWanted;
    this._tell();
  }

  _want(isWanted) {
    this._isWanted = isWanted;
    save(`drawer.${this.node.id}`, isWanted);
  }

  _tell() {
    this._opener.setAttribute("aria-expanded", String(this.node.open));
  }
}
