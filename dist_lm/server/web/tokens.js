// The tokens of an answer, coloured by their probability; arrow keys move, and the chosen token shows its alternatives.

import {element} from "./dom.js";

// A token has the class of the first bound that its probability reaches.
const CLASSES = [[0.9, "p90"], [0.5, "p50"], [0.2, "p20"], [0.05, "p5"], [0, "p0"]];
const LEGEND = [
  ["p90", "90 % and more"],
  ["p50", "50 to 90"],
  ["p20", "20 to 50"],
  ["p5", "5 to 20"],
  ["p0", "below 5 %"],
];

export function percent(logprob) {
  if (logprob === null || logprob === undefined) return "unknown";
  const value = 100 * Math.exp(logprob);
  if (value >= 99.95) return "100 %";
  if (value >= 10) return `${value.toFixed(1)} %`;
  return value >= 0.001 ? `${Number(value.toPrecision(2))} %` : "below 0.001 %";
}

/** Returns the view of tokens; without any it says so. */
export function tokenView(tokens) {
  if (!tokens?.length) {
    const words = "The probabilities of this answer are not kept any more, or were never sent.";
    return element("p", {class: "muted"}, words);
  }
  const detail = element("div", {class: "token-detail", "aria-live": "polite"}, hint(tokens));
  const spans = shownTexts(tokens).map((text, index) => tokenSpan(tokens[index], text, index));
  spans[0].tabIndex = 0;
  let current = 0;

  const show = (index) => {
    spans[current].tabIndex = -1;
    spans[current].removeAttribute("aria-current");
    current = index;
    spans[current].tabIndex = 0;
    spans[current].setAttribute("aria-current", "true");
    detail.replaceChildren(...detailOf(tokens[index], index, tokens.length));
  };
  const steps = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -tokens.length, End: tokens.length};
  const list = element(
    "div",
    {
      class: "tokens",
      role: "group",
      "aria-label": "Tokens by probability; arrow keys move",
      onclick: (event) => {
        const span = event.target.closest(".token");
        if (span) spans[Number(span.dataset.index)].focus();
      },
      onfocusin: (event) => show(Number(event.target.dataset.index)),
      onkeydown: (event) => {
        const step = steps[event.key];
        if (!step) return;
        event.preventDefault();
        event.stopPropagation();
        spans[Math.min(tokens.length - 1, Math.max(0, current + step))].focus();
      },
    },
    ...spans,
  );
  return element("div", {class: "token-view"}, legend(), list, detail);
}

/** Returns the text of each token. A character that several tokens share stands at the last one. */
function shownTexts(tokens) {
  const decoder = new TextDecoder();
  return tokens.map((token) => {
    if (!token.bytes) return token.text;
    if (!token.bytes.length) return token.text; // a mark, which has a name and no bytes
    return decoder.decode(new Uint8Array(token.bytes), {stream: true}) || "…";
  });
}

function tokenSpan(token, text, index) {
  const probability = Math.exp(token.logprob ?? -Infinity);
  const level = CLASSES.find(([bound]) => probability >= bound)[1];
  const isMark = token.bytes && !token.bytes.length;
  return element(
    "span",
    {
      class: `token ${level}${isMark ? " mark" : ""}`,
      tabindex: "-1",
      role: "button",
      "data-index": index,
      "aria-label": `${visible(text)}, ${percent(token.logprob)}`,
    },
    visible(text).replaceAll("↵", "↵\n"),
  );
}

/** Returns a text whose line breaks, tabs and outer spaces can be seen. */
function visible(text) {
  const marked = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return /^ +$/.test(marked) ? marked.replaceAll(" ", "·") : marked;
}

function detailOf(token, index, count) {
  const rows = [...(token.alternatives ?? [])];
  const isListed = rows.some((row) => row.text === token.text);
  if (!isListed) rows.push({text: token.text, logprob: token.logprob});
  rows.sort((one, other) => other.logprob - one.logprob);

  const place = element("p", {class: "muted"}, `Token ${index + 1} of ${count}`);
  const bars = rows.map((row) => {
    const isChosen = row.text === token.text;
    const bar = element("span", {class: "probability", "aria-hidden": "true"}, element("span"));
    bar.firstChild.style.width = `${100 * Math.exp(row.logprob)}%`;
    return element(
      "li",
      {class: isChosen ? "chosen" : ""},
      element("code", {}, visible(row.text) || "(nothing)"),
      bar,
      element("span", {class: "number"}, percent(row.logprob)),
      element("span", {class: "muted"}, isChosen ? "chosen" : ""),
    );
  });
  const nodes = [place, element("ol", {class: "alternatives"}, ...bars)];
  if (!token.alternatives?.length) nodes.push(element("p", {class: "muted"}, "The server names no alternatives."));
  return nodes;
}

function hint(tokens) {
  const logprobs = tokens.map((token) => token.logprob).filter((logprob) => typeof logprob === "number");
  const mean = logprobs.reduce((sum, logprob) => sum + logprob, 0) / logprobs.length;
  const words = `Choose a token to see its alternatives. Perplexity of the answer: ${Math.exp(-mean).toPrecision(3)}.`;
  return element("p", {class: "muted"}, words);
}

function legend() {
  const entries = LEGEND.map(([level, words]) => {
    return element("li", {}, element("span", {class: `token ${level}`}, "a"), words);
  });
  return element("ul", {class: "legend", "aria-label": "Colours"}, ...entries);
}
