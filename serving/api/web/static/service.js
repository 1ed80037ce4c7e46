// What the page asks of the service. Addresses are relative, so that it works under any path.

const ANSWER_WITHIN_MS = 120_000;

/** The service, or the browser, will not classify this picture; asking again is of no use. */
export class Refusal extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

/** The service cannot be reached, or is not ready: asking again later will work. */
export class Unavailable extends Error {}

/** The address that classifies pictures with a model. */
export function predictUrl(model) {
  // encodeURIComponent leaves these alone, and a shell may not.
  const name = encodeURIComponent(model).replace(/[!'()*]/g, (sign) => `%${sign.charCodeAt(0).toString(16)}`);
  return new URL(`predict?model=${name}`, document.baseURI).href;
}

/** Send one file as it is; returns the service's reply with `elapsed_ms` added. */
export async function classify(file, model) {
  await file.slice(0, 1).arrayBuffer().catch(() => {
    throw new Refusal("the browser cannot read this; it may be a folder, or a file that has been changed or moved");
  });
  const form = new FormData();
  form.append("image", file);
  const started = performance.now();
  const response = await ask(predictUrl(model), { method: "POST", body: form });
  const reply = await response.json().catch(() => null);
  if (response.ok && reply !== null) {
    return { ...reply, elapsed_ms: performance.now() - started };
  }
  // Of a picture that cannot be read only the reason: the headline says the rest.
  const words = reply?.errors?.[0]?.error ?? reply?.error ?? `the answer was ${response.status} ${response.statusText}, with no reason given`;
  throw response.status === 503 ? new Unavailable(words) : new Refusal(words, response.status);
}

/** Why a model cannot answer at the moment, or null when it can. */
export async function notReadyBecause(model) {
  const { reason, models } = await (await ask("readyz")).json();
  const available = models.some(({ name, state }) => name === model && state === "AVAILABLE");
  return available ? null : (reason ?? `${model} is not served any more`);
}

/** The models' descriptions, as the page has them when it is loaded. */
export async function describeModels() {
  return (await ask("models.json")).json();
}

async function ask(url, options = {}) {
  try {
    return await fetch(url, { ...options, signal: AbortSignal.timeout(ANSWER_WITHIN_MS) });
  } catch (error) {
    if (error.name === "TimeoutError") {
      throw new Refusal(`no answer within ${ANSWER_WITHIN_MS / 1000} seconds`);
    }
    throw new Unavailable("no connection to the service");
  }
}
