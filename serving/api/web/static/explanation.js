import { explain } from "./service.js";

const MARKER = [255, 225, 74]; // in light and in dark mode, because it lies on the picture
const MAX_ALPHA = 200;

/** The heat map of one picture, requested when it is first shown. */
export class Explanation {
  #figure;
  #button;
  #image;
  #model;
  #statement = null; // what the heat map says, once there is one

  /** Offer a heat map of `image`, an ImageData of the model's size, over the picture in `figure`. */
  constructor(figure, button, image, model) {
    this.#figure = figure;
    this.#button = button;
    this.#image = image;
    this.#model = model;
    button.addEventListener("click", () => this.#toggle());
    button.hidden = false;
  }

  async #toggle() {
    const shows = this.#button.getAttribute("aria-pressed") === "false";
    try {
      if (this.#statement === null) {
        await this.#request();
      }
      this.#show(shows);
    } catch (error) {
      this.#say(`no explanation: ${error.message}`);
    }
  }

  async #request() {
    this.#button.disabled = true;
    this.#say("asking the model");
    try {
      const { heat_map, class_id } = await explain(this.#image, this.#model);
      this.#draw(heat_map.flat(), this.#model.class_names[class_id] ?? `class ${class_id}`);
    } finally {
      this.#button.disabled = false;
    }
  }

  #draw(values, label) {
    const { width, height } = this.#image;
    const heat = new ImageData(width, height);
    values.forEach((value, pixel) => heat.data.set([...MARKER, Math.round(MAX_ALPHA * value)], 4 * pixel));
    const canvas = this.#find(".heat");
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(heat, 0, 0);
    this.#statement = values.some((value) => value > 0) ? `yellow speaks for ${label}` : `nothing in it speaks for ${label}`;
    canvas.setAttribute("aria-label", this.#statement);
  }

  #show(visible) {
    this.#figure.classList.toggle("explained", visible);
    this.#find(".heat").hidden = !visible;
    this.#button.setAttribute("aria-pressed", String(visible));
    this.#say(visible ? this.#statement : "");
  }

  #say(text) {
    this.#find(".statement").textContent = text;
  }

  #find(selector) {
    return this.#figure.querySelector(selector);
  }
}
