/* A request as the user has it so far, and the body that it becomes. */

export const SCOPES = {
  all: "the whole request",
  prompt: "the prompt only",
  response: "the answer only",
  generation: "tokens written after the prompt",
};

export function newDraft() {
  return {
    prompt: "What is 7 plus 5?",
    system: "",
    temperature: 0,
    maxTokens: 256,
    // Left out unless asked for: greedy answers need none.
    seed: null,
    // Base models have no chat template: their prompt goes as it is.
    isPlain: false,
  };
}

export function pathOf(draft) {
  return draft.isPlain ? "v1/completions" : "v1/chat/completions";
}

/** `steering`: list of { name, strength, scope }; empty for the default answer. */
export function bodyOf(draft, model, steering) {
  const system = draft.system === "" ? [] : [{ role: "system", content: draft.system }];
  const asked = draft.isPlain
    ? { prompt: draft.prompt }
    : { messages: [...system, { role: "user", content: draft.prompt }] };
  const seed = draft.seed === null ? {} : { seed: draft.seed };
  const profile =
    steering.length === 0 ? {} : { steering_profile: steering.length === 1 ? steering[0] : [...steering] };
  return { model, ...asked, temperature: draft.temperature, max_tokens: draft.maxTokens, ...seed, ...profile };
}

export function streamed(body) {
  return { ...body, stream: true, stream_options: { include_usage: true } };
}
