// Choices between two answers, as lines of the reader `rankings` of stage=reward and stage=preference:
// {"prompt": [turns], "completions": ["...", "..."], "ranks": [0, 1]}

import {load, save} from "./store.js";

const NAME = "rankings";
const ROLES = ["system", "user", "assistant"];

/** Returns why two answers cannot be ranked, as a sentence; an empty text: they can. */
export function obstacle(answers) {
  if (answers.some((answer) => answer.calls?.length)) return "Answers with calls make no ranking.";
  if (answers.some((answer) => !answer.content)) return "An answer is empty: there is nothing to learn.";
  if (answers[0].content === answers[1].content) return "The answers are equal: there is nothing to learn.";
  return "";
}

/**
 * Returns a ranking of two answers.
 *
 * @param {{role: string, content: string}[]} messages the prompt, which ends with the user
 * @param {string[]} completions the texts of the answers
 * @param {number} better index of the better one
 */
export function rankingOf(messages, completions, better) {
  const prompt = messages.map(({role, content}) => ({role, content}));
  if (!prompt.every(({role}) => ROLES.includes(role))) throw new Error("a prompt of a ranking has no calls");
  return {prompt, completions, ranks: completions.map((_, index) => (index === better ? 0 : 1))};
}

export function loadRankings() {
  return load(NAME, []);
}

/** Keeps the rankings. Returns whether there was space; nothing is dropped to make some. */
export function saveRankings(rankings) {
  return save(NAME, rankings);
}

/** Returns the lines of the file. */
export function linesOf(rankings) {
  return rankings.map((ranking) => `${JSON.stringify(ranking)}\n`).join("");
}
