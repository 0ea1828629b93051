// What survives a reload: conversations, settings, choices. The browser's storage is small, so the space of
// conversations is bounded: the oldest lose the details of their tokens first, then they are forgotten.

const PREFIX = "dist_lm.";
const CONVERSATION = `${PREFIX}conversation.`;
const MOST_CHARACTERS = 3_000_000;
const MOST_CONVERSATIONS = 100;
const MOST_DETAILS = 1_000_000; // characters of the tokens of one conversation
const DETAILS = ["tokens", "ids", "promptIds"];

/** Returns a value that was kept under a name, or `fallback`. */
export function load(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback; // storage is switched off, or holds what another program wrote
  }
}

/** Keeps a value under a name. Returns whether there was space. */
export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Returns the conversations, the newest first. */
export function loadConversations() {
  const conversations = [];
  for (const key of keysOfConversations()) {
    const conversation = load(key.slice(PREFIX.length), null);
    if (conversation?.turns && conversation.chosen) conversations.push(ended(conversation));
  }
  return conversations.sort((one, other) => other.updated - one.updated);
}

/** Marks answers that were under way when the page was closed: they will not go on. */
function ended(conversation) {
  for (const turn of Object.values(conversation.turns)) {
    if (turn.role === "assistant" && !turn.finish && !turn.error && !turn.edited) turn.stopped = true;
  }
  return conversation;
}

/** Keeps a conversation. Returns whether there was space for it. */
export function saveConversation(conversation) {
  const name = CONVERSATION.slice(PREFIX.length) + conversation.id;
  const bounded = withNewestDetails(conversation);
  makeSpace(conversation.id, JSON.stringify(bounded).length);
  return save(name, bounded) || save(name, withoutDetails(conversation));
}

export function deleteConversation(id) {
  try {
    localStorage.removeItem(CONVERSATION + id);
  } catch {
    // Storage is switched off: nothing was kept.
  }
}

function makeSpace(newestId, length) {
  const others = loadConversations().filter((conversation) => conversation.id !== newestId);
  let total = length + others.reduce((sum, other) => sum + JSON.stringify(other).length, 0);
  let count = others.length + 1;
  const oldestFirst = others.reverse();
  for (const shrink of [withoutDetails, () => null]) {
    for (const [index, other] of oldestFirst.entries()) {
      if (!other || (total <= MOST_CHARACTERS && count <= MOST_CONVERSATIONS)) continue;
      const smaller = shrink(other);
      total += (smaller ? JSON.stringify(smaller).length : 0) - JSON.stringify(other).length;
      oldestFirst[index] = smaller;
      if (smaller) {
        save(CONVERSATION.slice(PREFIX.length) + smaller.id, smaller);
      } else {
        deleteConversation(other.id);
        count--;
      }
    }
  }
}

/** Returns a conversation whose oldest answers have no tokens, if all of them together are too long. */
function withNewestDetails(conversation) {
  const turns = {...conversation.turns};
  let space = MOST_DETAILS;
  for (const [id, turn] of Object.entries(turns).reverse()) {
    if (turn.tokens) space -= JSON.stringify(turn).length;
    if (space < 0) turns[id] = withoutTokens(turn);
  }
  return {...conversation, turns};
}

function withoutDetails(conversation) {
  const turns = Object.entries(conversation.turns).map(([id, turn]) => [id, withoutTokens(turn)]);
  return {...conversation, turns: Object.fromEntries(turns)};
}

function withoutTokens(turn) {
  return Object.fromEntries(Object.entries(turn).filter(([name]) => !DETAILS.includes(name)));
}

function keysOfConversations() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(CONVERSATION));
  } catch {
    return [];
  }
}
