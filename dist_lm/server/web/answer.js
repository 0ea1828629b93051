// Reads streams of answers into plain values, which can be kept and drawn:
// {content, calls, tokens, ids, promptIds, usage, finish, version, remembered, model, seed, request, seconds, ...}
// A token is {text, bytes, logprob, alternatives: [{text, logprob}]}.

import {ApiError} from "./api.js";

const ALTERNATIVES = 5;
const SEEDS = 2 ** 31;
export const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens"];

const CHAT = "v1/chat/completions";
const COMPLETIONS = "v1/completions";

/** Returns the fields of a request for settings; empty ones are left to the server, but for the seed. */
export function samplingOf(settings, seedOffset = 0) {
  const fields = {};
  for (const name of SAMPLING) if (isNumber(settings[name])) fields[name] = Number(settings[name]);

  // The page draws the seed, so that it can tell which one an answer came from.
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS;
  fields.seed = isNumber(settings.seed) ? Number(settings.seed) + seedOffset : drawn;
  return fields;
}

export function isNumber(value) {
  return value !== undefined && value !== null && value !== "" && Number.isFinite(Number(value));
}

/** Returns a new answer without text, with the settings it is asked for by. */
export function newAnswer(body) {
  const {messages, tools, prompt, suffix, ...request} = body; // these are kept as turns and texts already
  return {content: "", calls: [], tokens: [], ids: [], finish: null, model: body.model, request};
}

/**
 * Streams the answer to a chat into `answer`.
 *
 * @param {(answer: object) => void} onChange called after every event
 * @returns {Promise<object>} the answer; with `error` or `stopped` where it did not come to its end
 */
export async function streamChat(api, body, answer, signal, onChange) {
  const request = {...body, logprobs: true, top_logprobs: ALTERNATIVES, return_token_ids: true};
  return stream(api, CHAT, request, answer, signal, onChange, readChat);
}

/** Streams a completion, as `streamChat`. */
export async function streamCompletion(api, body, answer, signal, onChange) {
  const request = {...body, logprobs: ALTERNATIVES, return_token_ids: true};
  return stream(api, COMPLETIONS, request, answer, signal, onChange, readCompletion);
}

async function stream(api, path, request, answer, signal, onChange, read) {
  const begin = performance.now();
  const seconds = () => (performance.now() - begin) / 1000;
  try {
    for await (const event of api.events(path, request, signal)) {
      read(answer, event);
      if (answer.firstAfter === undefined && answer.tokens.length) answer.firstAfter = seconds();
      answer.seconds = seconds();
      onChange(answer);
    }
  } catch (error) {
    if (signal.aborted) answer.stopped = true;
    else if (error instanceof ApiError) Object.assign(answer, {error: error.message, status: error.status});
    else throw error;
  }
  answer.seconds = seconds();
  return answer;
}

function readChat(answer, event) {
  readHead(answer, event);
  for (const choice of event.choices) {
    answer.content += choice.delta.content ?? "";
    for (const call of choice.delta.tool_calls ?? []) {
      const known = (answer.calls[call.index] ??= {id: "", name: "", arguments: ""});
      known.id ||= call.id ?? "";
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    for (const entry of choice.logprobs?.content ?? []) answer.tokens.push(tokenOf(entry));
    readChoice(answer, choice);
  }
}

function readCompletion(answer, event) {
  readHead(answer, event);
  for (const choice of event.choices) {
    answer.content += choice.text ?? "";
    const {tokens = [], token_logprobs: logprobs = [], top_logprobs: tops} = choice.logprobs ?? {};
    tokens.forEach((text, index) => {
      const alternatives = Object.entries(tops?.[index] ?? {}).map(([other, logprob]) => ({text: other, logprob}));
      answer.tokens.push({text, logprob: logprobs[index], alternatives});
    });
    readChoice(answer, choice);
  }
}

function readHead(answer, event) {
  answer.id ??= event.id;
  if (event.usage) answer.usage = event.usage;
  if (event.prompt_token_ids) answer.promptIds = event.prompt_token_ids;
  if (event.weights_version !== undefined) answer.version = event.weights_version;
  if (event.remembered_tokens !== undefined) answer.remembered = event.remembered_tokens;
}

function readChoice(answer, choice) {
  if (choice.token_ids) answer.ids.push(...choice.token_ids);
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

function tokenOf(entry) {
  const alternatives = (entry.top_logprobs ?? []).map(({token, logprob}) => ({text: token, logprob}));
  return {text: entry.token, bytes: entry.bytes, logprob: entry.logprob, alternatives};
}

/** Returns what is known of an answer in a few words. */
export function factsOf(answer, contextLength) {
  const facts = [answer.model];
  const count = answer.usage?.completion_tokens ?? answer.tokens?.length ?? 0;
  if (count) facts.push(`${count} token${count === 1 ? "" : "s"}`);
  const seconds = answer.seconds - answer.firstAfter;
  const rate = (count - 1) / seconds;
  if (count > 1 && seconds > 0.05) facts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  if (answer.firstAfter !== undefined) facts.push(`first after ${answer.firstAfter.toFixed(2)} s`);
  if (answer.usage && contextLength) facts.push(`${answer.usage.total_tokens} of ${contextLength} in context`);
  if (answer.finish === "length") facts.push("cut off by the limit of tokens");
  if (answer.stopped) facts.push("stopped");
  return facts;
}
