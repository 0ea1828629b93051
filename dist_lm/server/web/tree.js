// A conversation as a tree of turns: an edited or repeated turn stands beside the earlier one, and one child of each
// turn is chosen. A turn is {id, parent, role, content, calls, results, ...facts of an answer}.

const ROOT = "";

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation() {
  return {
    id: newId(),
    title: "",
    updated: Date.now(), // milliseconds since 1970
    system: "",
    tools: [], // in OpenAI's form
    toolChoice: "auto", // or "none", "required", "=NAME"
    parallelCalls: true,
    turns: {}, // by id
    chosen: {}, // by id of a turn: the id of the one that is shown behind it
  };
}

/** Adds a turn behind `parent` (null: as the first one), chooses it and returns it. */
export function addTurn(conversation, parent, turn) {
  const added = {...turn, id: newId(), parent: parent ?? ROOT};
  conversation.turns[added.id] = added;
  choose(conversation, added);
  conversation.updated = Date.now();
  if (!conversation.title && turn.role === "user") conversation.title = turn.content.trim().slice(0, 60);
  return added;
}

/** Makes a turn the one that is shown among its siblings. */
export function choose(conversation, turn) {
  conversation.chosen[turn.parent] = turn.id;
}

/** Takes a turn out that nothing follows, and chooses its newest sibling. */
export function removeTurn(conversation, turn) {
  delete conversation.turns[turn.id];
  const others = siblingsOf(conversation, turn);
  if (others.length) choose(conversation, others.at(-1));
  else delete conversation.chosen[turn.parent];
}

/** Returns the turns that are shown, in their order. */
export function shownTurns(conversation) {
  const turns = [];
  let id = conversation.chosen[ROOT];
  while (id && conversation.turns[id] && turns.length <= Object.keys(conversation.turns).length) {
    turns.push(conversation.turns[id]);
    id = conversation.chosen[id];
  }
  return turns;
}

/** Returns the turns that stand in the same place, the turn itself among them, the oldest first. */
export function siblingsOf(conversation, turn) {
  return Object.values(conversation.turns).filter((other) => other.parent === turn.parent);
}

/** Returns the turns from the first one up to `turn`, which is included. */
export function turnsUpTo(conversation, turn) {
  const turns = [];
  for (let at = turn; at; at = conversation.turns[at.parent]) turns.unshift(at);
  return turns;
}

/** Returns a new conversation that begins with the turns up to `turn`. */
export function forked(conversation, turn) {
  const title = `${conversation.title} (fork)`;
  const copy = {...structuredClone(conversation), id: newId(), title, turns: {}, chosen: {}};
  let parent = null;
  for (const original of turnsUpTo(conversation, turn)) parent = addTurn(copy, parent, structuredClone(original)).id;
  return copy;
}

/** Returns turns in OpenAI's form. Each result of a turn of results is a message of its own. */
export function messagesOf(system, turns) {
  const messages = system.trim() ? [{role: "system", content: system}] : [];
  for (const turn of turns) {
    if (turn.role === "tool") {
      messages.push(...turn.results.map(({id, content}) => ({role: "tool", tool_call_id: id, content})));
    } else if (turn.role === "assistant" && turn.calls?.length) {
      const calls = turn.calls.map((call) => {
        return {id: call.id, type: "function", function: {name: call.name, arguments: call.arguments}};
      });
      messages.push({role: "assistant", content: turn.content || null, tool_calls: calls});
    } else {
      messages.push({role: turn.role, content: turn.content});
    }
  }
  return messages;
}
