import { decode, reduce } from "./reduce.js";

const BARS_AT_FIRST = 5;
const SMALL_PIXELS = 96; // a picture this small is enlarged with its pixels left square

let reducing = Promise.resolve(); // one picture at a time, as a large one fills much memory while it is decoded

/** One picture and what became of it. */
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

  /** Show that it waits: `headline`, and why. */
  wait(headline, why = "") {
    this.#show({ state: "waiting", headline, words: why });
  }

  /** Show the service's reply, and the picture at the size of the model that gave it. */
  answer({ model, predictions: [prediction], timing_ms, elapsed_ms }, { width, height }) {
    this.#show({ state: "answered", headline: prediction.label, confidence: percent(prediction.confidence) });
    const server_ms = timing_ms.decode + timing_ms.predict;
    this.#find(".took").textContent =
      `${model.name}, version ${model.version}: ${milliseconds(server_ms)} in the service, ` +
      `${milliseconds(elapsed_ms)} with the way there and back`;
    const shares = Object.entries(prediction.probabilities).sort(([, a], [, b]) => (b ?? -1) - (a ?? -1));
    this.#find(".bars").replaceChildren(...shares.map(([name, share]) => bar(name, share)));
    this.#find(".bars").hidden = false;
    this.#find(".more").hidden = shares.length <= BARS_AT_FIRST;
    this.#showBars(false);
    reducing = reducing.then(() => this.#showReduced(width, height)).catch(() => this.#showNotReduced());
  }

  /** Show that there will be no answer, in the words of who says so. */
  fail(headline, words, { retry }) {
    this.#show({ state: "refused", headline, words });
    this.#find(".retry").hidden = !retry;
  }

  remove() {
    this.#item.remove();
    URL.revokeObjectURL(this.#url);
  }

  #find(selector) {
    return this.#item.querySelector(selector);
  }

  #show({ state, headline, confidence = "", words = "" }) {
    this.#find(".card").dataset.state = state;
    this.#find(".label").textContent = headline;
    this.#find(".confidence").textContent = confidence;
    this.#find(".words").textContent = words;
    this.#find(".words").hidden = words === "";
    this.#find(".retry").hidden = true;
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
    this.#find(".more").textContent = all ? `Only the first ${BARS_AT_FIRST}` : `All ${rows.length} classes`;
  }

  async #showReduced(width, height) {
    if (!this.#item.isConnected) {
      return;
    }
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
  }

  #showNotReduced() {
    this.#find(".seen .frame").hidden = true;
    this.#find(".seen .size").textContent = "cannot be shown by this browser";
    this.#find(".seen").hidden = false;
  }
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

/** A share of one, as people read it. */
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
