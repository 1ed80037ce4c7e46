// Requests to the service. URLs are relative, so that the page works under any path.

const TIMEOUT_MS = 120_000;

/** The service or the browser refused this image; a retry would fail again. */
export class Refusal extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

/** The service cannot be reached or is not ready; a later retry can succeed. */
export class Unavailable extends Error {}

/** The URL that classifies images with a model. */
export function predictUrl(model) {
  // Special to a shell, but not escaped by encodeURIComponent.
  const name = encodeURIComponent(model).replace(/[!'()*]/g, (sign) => `%${sign.charCodeAt(0).toString(16)}`);
  return new URL(`predict?model=${name}`, document.baseURI).href;
}

/** Send one file unchanged; returns the service's response with `elapsed_ms` added. */
export async function classify(file, model) {
  await file.slice(0, 1).arrayBuffer().catch(() => {
    throw new Refusal("the browser cannot read this file; it may be a folder, or was changed or moved");
  });
  const form = new FormData();
  form.append("image", file);
  const started = performance.now();
  const response = await request(predictUrl(model), { method: "POST", body: form });
  const content = await response.json().catch(() => null);
  if (response.ok && content !== null) {
    return { ...content, elapsed_ms: performance.now() - started };
  }
  throw failure(response, content);
}

/**
 * Request a heat map of the predicted class for an ImageData of the model's size. Returns `heat_map`, rows of numbers from
 * 0 to 1, and `class_id`.
 */
export async function explain(image, { name, version }) {
  const url = `v1/models/${encodeURIComponent(name)}/versions/${version}:predict`;
  const body = JSON.stringify({ signature_name: "explain", instances: [rows(image)] });
  const response = await request(url, { method: "POST", body });
  const content = await response.json().catch(() => null);
  if (response.ok && content !== null) {
    return content.predictions[0];
  }
  throw failure(response, content);
}

function rows({ data, width, height }) {
  const pixel = (at) => [data[at], data[at + 1], data[at + 2]];
  return Array.from({ length: height }, (_, y) => Array.from({ length: width }, (_, x) => pixel(4 * (y * width + x))));
}

function failure(response, content) {
  // For an unreadable image only the reason: the headline has the rest.
  const reason = content?.errors?.[0]?.error ?? content?.error ?? `the service responded ${response.status} ${response.statusText} without a reason`;
  return response.status === 503 ? new Unavailable(reason) : new Refusal(reason, response.status);
}

/** The reason why a model is not ready, or null if it is. */
export async function notReadyBecause(model) {
  const { reason, models } = await (await request("readyz")).json();
  const available = models.some(({ name, state }) => name === model && state === "AVAILABLE");
  return available ? null : (reason ?? `${model} is no longer served`);
}

/** The models, like those embedded in the page. */
export async function describeModels() {
  return (await request("models.json")).json();
}

async function request(url, options = {}) {
  try {
    return await fetch(url, { ...options, signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch (error) {
    if (error.name === "TimeoutError") {
      throw new Refusal(`no response within ${TIMEOUT_MS / 1000} seconds`);
    }
    throw new Unavailable("no connection to the service");
  }
}
