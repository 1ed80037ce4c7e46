import { Explanation } from "./explanation.js";
import { decode, reduce } from "./reduce.js";

const BARS_AT_FIRST = 5;
const SMALL_PIXELS = 96; // smaller images are enlarged without smoothing

let reducing = Promise.resolve(); // one image at a time: decoding a large one takes much memory

/** One image and its result. */
export class Card {
  #file;
  #item;
  #url;

  constructor(file, onRetry) {
    this.#file = file;
    this.#item = document.getElementById("card").content.cloneNode(true).firstElementChild;
    this.#url = URL.createObjectURL(file);
    this.#find(".file").textContent = file.name;
    const image = this.#find(".sent img");
    image.alt = `${file.name}, as sent`;
    image.addEventListener("load", () => {
      image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL_PIXELS);
      this.#find(".sent .size").textContent = `${image.naturalWidth} × ${image.naturalHeight}`;
    });
    image.addEventListener("error", () => this.#find(".sent").classList.add("not-shown"));
    image.src = this.#url;
    this.#find(".retry").addEventListener("click", onRetry);
    this.#find(".more").addEventListener("click", () => this.#toggleBars());
    this.wait("Waiting");
  }

  get element() {
    return this.#item;
  }

  /** Show that the image is waiting, and why. */
  wait(headline, details = "") {
    this.#show({ state: "waiting", headline, details });
  }

  /** Show the prediction, and the image at the model's size. */
  showResult({ model, predictions: [prediction], timing_ms, elapsed_ms }, description) {
    this.#show({ state: "classified", headline: prediction.label, confidence: percent(prediction.confidence) });
    const limits = describeLimits(prediction);
    this.#find(".limits").replaceChildren(...limits);
    this.#find(".limits").hidden = limits.length === 0;
    const server_ms = timing_ms.decode + timing_ms.predict;
    this.#find(".timing").textContent =
      `${model.name}, version ${model.version}: ${milliseconds(server_ms)} in the service, ` +
      `${milliseconds(elapsed_ms)} round trip`;
    const probabilities = Object.entries(prediction.probabilities).sort(([, a], [, b]) => (b ?? -1) - (a ?? -1));
    this.#find(".bars").replaceChildren(...probabilities.map(([name, share]) => bar(name, share)));
    this.#find(".bars").hidden = false;
    this.#find(".more").hidden = probabilities.length <= BARS_AT_FIRST;
    this.#showBars(false);
    reducing = reducing.then(() => this.#showReduced(description)).catch(() => this.#showNotReduced());
  }

  /** Show an error: a headline, and the details from the service or the browser. */
  fail(headline, details, { retry }) {
    this.#show({ state: "refused", headline, details });
    this.#find(".retry").hidden = !retry;
  }

  remove() {
    this.#item.remove();
    URL.revokeObjectURL(this.#url);
  }

  #find(selector) {
    return this.#item.querySelector(selector);
  }

  #show({ state, headline, confidence = "", details = "" }) {
    this.#find(".card").dataset.state = state;
    this.#find(".label").textContent = headline;
    this.#find(".confidence").textContent = confidence;
    this.#find(".details").textContent = details;
    this.#find(".details").hidden = details === "";
    this.#find(".retry").hidden = true;
    this.#find(".limits").hidden = true;
  }

  #toggleBars() {
    this.#showBars(this.#find(".more").getAttribute("aria-expanded") === "false");
  }

  #showBars(all) {
    const rows = [...this.#find(".bars").children];
    rows.forEach((row, rank) => {
      row.hidden = !all && rank >= BARS_AT_FIRST;
    });
    this.#find(".more").setAttribute("aria-expanded", String(all));
    this.#find(".more").textContent = all ? `Only the top ${BARS_AT_FIRST}` : `All ${rows.length} classes`;
  }

  async #showReduced(description) {
    if (!this.#item.isConnected) {
      return;
    }
    const { width, height, explains } = description;
    const bitmap = await decode(this.#file);
    const image = await reduce(bitmap, width, height);
    bitmap.close();
    const canvas = this.#find(".seen canvas");
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", `${this.#file.name} at ${width} × ${height} pixels`);
    this.#find(".seen .size").textContent = `${width} × ${height}`;
    this.#find(".seen").hidden = false;
    if (explains) {
      new Explanation(this.#find(".seen"), this.#find(".explain"), image, description);
    }
  }

  #showNotReduced() {
    this.#find(".seen .frame").hidden = true;
    this.#find(".seen .size").textContent = "cannot be shown by this browser";
    this.#find(".seen").hidden = false;
  }
}

/** Say what limits a prediction. Models without a guard have no such fields. */
function describeLimits({ typicality, is_typical, label_set }) {
  const limits = [];
  if (is_typical === false) {
    limits.push(limit("unlike", "Unlike the training images", `typicality ${percent(typicality)}`));
  }
  if (label_set && label_set.length > 1) {
    limits.push(limit("plausible", describeSet(label_set), "at the 90% level"));
  }
  return limits;
}

function describeSet(labels) {
  return labels.length > 4 ? `One of ${labels.length} labels` : `${labels.slice(0, -1).join(", ")} or ${labels.at(-1)}`;
}

function limit(kind, text, note) {
  const item = document.createElement("li");
  const detail = document.createElement("span");
  item.className = kind;
  detail.className = "figure";
  detail.textContent = note;
  item.append(text, " ", detail);
  return item;
}

function bar(name, share) {
  const row = document.createElement("li");
  const label = document.createElement("span");
  const value = document.createElement("span");
  label.textContent = name;
  value.textContent = percent(share);
  row.style.setProperty("--share", share ?? 0);
  row.append(label, " ", value);
  return row;
}

/** Format a probability in percent. */
export function percent(share) {
  if (share === null) {
    return "not a number"; // JSON has no NaN
  }
  if (share > 0.999 && share < 1) {
    return ">99.9%";
  }
  return share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(1)}%`;
}

function milliseconds(ms) {
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}
