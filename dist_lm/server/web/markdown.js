// A small Markdown: paragraphs, headings, lists, quotes, code, emphasis, links. It makes DOM nodes, never HTML text.
// The text of a model grows while it is drawn, so blocks that did not change keep their nodes.

import {button, copyText, element} from "./dom.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ADDRESS = /^(https?:\/\/|mailto:)[^\s<>"]+$/i;
const BARE_ADDRESS = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_]/iy;
const DEEPEST = 6; // lists in lists, quotes in quotes, emphasis in emphasis

/** Returns the blocks of a text: {kind, ...}. A block of code that is not closed goes to the end. */
export function blocksOf(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      at++;
    } else if (fence) {
      const [, indent, mark, language] = fence;
      const close = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
      const code = [];
      for (at++; at < lines.length && !close.test(lines[at]); at++) code.push(dedented(lines[at], indent.length));
      at++;
      blocks.push({kind: "code", language, text: code.join("\n")});
    } else if (heading) {
      blocks.push({kind: "heading", level: heading[1].length, text: heading[2].replace(/\s#+\s*$/, "")});
      at++;
    } else if (RULE.test(line)) {
      blocks.push({kind: "rule"});
      at++;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const quoted = [];
      for (; at < lines.length && QUOTE.test(lines[at]); at++) quoted.push(QUOTE.exec(lines[at])[1]);
      blocks.push({kind: "quote", blocks: blocksOf(quoted.join("\n"), depth + 1)});
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const [list, next] = listFrom(lines, at, depth);
      blocks.push(list);
      at = next;
    } else {
      const paragraph = [line];
      for (at++; at < lines.length && !endsParagraph(lines[at]); at++) paragraph.push(lines[at]);
      blocks.push({kind: "paragraph", text: paragraph.join("\n")});
    }
  }
  return blocks;
}

function endsParagraph(line) {
  return !line.trim() || [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function dedented(line, most) {
  const spaces = /^ */.exec(line)[0].length;
  return line.slice(Math.min(spaces, most));
}

/** Returns the list that begins at a line, and the number of the line behind it. */
function listFrom(lines, begin, depth) {
  const [, indent, firstMark] = ITEM.exec(lines[begin]);
  const isOrdered = /\d/.test(firstMark);
  const items = [];
  let at = begin;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    const isSibling = match && match[1].length <= indent.length + 1 && /\d/.test(match[2]) === isOrdered;
    if (!isSibling || match[1].length < indent.length || RULE.test(lines[at])) break;

    // What is indented below the mark belongs to the item, also behind an empty line.
    const content = [match[4]];
    const inner = match[1].length + 2;
    for (at++; at < lines.length; at++) {
      const isInside = /^ */.exec(lines[at])[0].length >= inner;
      const goesOn = lines[at].trim() && lines[at - 1].trim() && !endsParagraph(lines[at]);
      const isGap = !lines[at].trim() && /^ */.exec(lines[at + 1] ?? "")[0].length >= inner && lines[at + 1].trim();
      if (!isInside && !goesOn && !isGap) break;
      content.push(dedented(lines[at], match[1].length + match[2].length + 1));
    }
    items.push(blocksOf(content.join("\n"), depth + 1));
    if (!(lines[at] ?? "").trim() && ITEM.test(lines[at + 1] ?? "")) at++; // a list with space between its items
  }
  return [{kind: "list", ordered: isOrdered, start: isOrdered ? parseInt(firstMark, 10) : 1, items}, at];
}

/** Draws a text into a container; blocks at the beginning that are as before keep their nodes. */
export function drawMarkdown(container, text) {
  const blocks = blocksOf(text);
  const before = container.markdownKeys ?? [];
  const keys = blocks.map((block) => JSON.stringify(block));
  let same = 0;
  while (same < keys.length && same < before.length && keys[same] === before[same]) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map(drawBlock));
  container.markdownKeys = keys;
}

function drawBlock(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.text, block.language);
    case "heading":
      // Headings of an answer stand below those of the page.
      return element(`h${Math.min(6, block.level + 2)}`, {}, ...inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(drawBlock));
    case "list": {
      const items = block.items.map((blocks) => element("li", {}, ...itemNodes(blocks)));
      return element(block.ordered ? "ol" : "ul", block.start === 1 ? {} : {start: block.start}, ...items);
    }
    default:
      return element("p", {}, ...inline(block.text));
  }
}

function itemNodes(blocks) {
  const [first, ...rest] = blocks;
  if (first?.kind !== "paragraph") return blocks.map(drawBlock);
  return [...inline(first.text), ...rest.map(drawBlock)];
}

/** Returns a block of code with a button that copies it. */
export function codeBlock(text, language = "") {
  const copy = button("Copy", "copy", async () => {
    if (await copyText(text)) copy.lastChild.textContent = "Copied";
    setTimeout(() => (copy.lastChild.textContent = "Copy"), 1500);
  });
  return element(
    "figure",
    {class: "code"},
    element("figcaption", {}, element("span", {}, language || "code"), copy),
    element("pre", {tabindex: "0", "aria-label": `Code${language ? `, ${language}` : ""}`}, element("code", {}, text)),
  );
}

/** Returns the nodes of a line of text: code, emphasis, links, and line breaks as they are. */
export function inline(text, depth = 0) {
  const nodes = [];
  const withoutEnd = new Set(); // marks that do not occur again: looked for once
  let plain = "";
  let at = 0;
  const push = (node, next) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
    at = next;
  };
  const endOf = (mark, from) => {
    if (withoutEnd.has(mark)) return -1;
    const end = text.indexOf(mark, from);
    if (end < 0) withoutEnd.add(mark);
    return end;
  };

  while (at < text.length) {
    const character = text[at];
    if (character === "\\" && /[\\`*_[\]()#>~-]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (character === "`") {
      const mark = /^`+/.exec(text.slice(at, at + 16))[0];
      const end = endOf(mark, at + mark.length);
      if (end > at + mark.length - 1 && end > 0) {
        const code = text.slice(at + mark.length, end);
        push(element("code", {}, /^ .*[^ ].* $/s.test(code) ? code.slice(1, -1) : code), end + mark.length);
        continue;
      }
    }
    if ((character === "*" || character === "_") && depth < DEEPEST) {
      const mark = text[at + 1] === character ? character.repeat(2) : character;
      const begin = at + mark.length;
      const end = endOf(mark, begin + 1);
      // Marks inside a word with `_`, and marks beside spaces, are text: snake_case, 2 * 3 * 4.
      const isInWord = character === "_" && (/\w/.test(text[at - 1] ?? "") || /\w/.test(text[end + mark.length] ?? ""));
      if (end > 0 && !isInWord && !/\s/.test(text[begin]) && !/\s/.test(text[end - 1])) {
        const tag = mark.length === 2 ? "strong" : "em";
        push(element(tag, {}, ...inline(text.slice(begin, end), depth + 1)), end + mark.length);
        continue;
      }
    }
    if (character === "[" && depth < DEEPEST) {
      const close = endOf("](", at + 1);
      const end = close > 0 ? endOf(")", close + 2) : -1;
      const address = text.slice(close + 2, end);
      if (end > 0 && ADDRESS.test(address)) {
        push(link(address, inline(text.slice(at + 1, close), DEEPEST)), end + 1);
        continue;
      }
    }
    BARE_ADDRESS.lastIndex = at;
    const bare = character === "h" && depth < DEEPEST && BARE_ADDRESS.exec(text);
    if (bare) {
      push(link(bare[0], [bare[0]]), at + bare[0].length);
      continue;
    }
    plain += character;
    at++;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function link(address, children) {
  const rel = "noopener noreferrer nofollow";
  return element("a", {href: address, title: address, target: "_blank", rel}, ...children);
}
