import { Card, percent } from "./card.js";
import { Queue } from "./queue.js";
import { Unavailable, classify, describeModels, notReadyBecause, predictUrl } from "./service.js";

const CLASS_NAMES_AT_FIRST = 40;
const LONG_NAME = 16;
const FIRST_BACKOFF_MS = 500;
const MAX_BACKOFF_MS = 5_000;
const COPIED_MS = 2_000;
const HEADLINES = { 400: "Could not be read", 404: "No such model", 413: "Too large", 415: "Could not be read" };

const NO_MODEL = {
  name: "No model yet",
  available: false,
  loading: false,
  problem: "The service has no model yet. Reload this page when its models folder has one.",
};

const at = (id) => document.getElementById(id);

let models = JSON.parse(at("models").textContent);
let model = models.find(({ problem }) => problem === null) ?? models[0] ?? NO_MODEL;
let cards = [];
const queue = new Queue(untilAvailable);

// The model

function showModel() {
  const { name, loading, problem } = model;
  const accepts = problem === null || loading; // while the model loads, images are queued
  document.title = problem === null ? `${name}, version ${model.version}` : name;
  at("model-name").textContent = name;
  at("model-name").parentElement.classList.toggle("long", name.length > LONG_NAME);
  at("model-version").textContent = problem === null ? `version ${model.version}` : "";
  at("model-facts").textContent = problem === null ? facts(model) : "";
  at("model-problem").textContent = accepts ? "" : problem;
  at("model-problem").hidden = accepts;
  at("drop-zone").hidden = !accepts;
  at("terminal").hidden = !accepts;
  at("curl").textContent = `curl -F image=@picture.jpg "${predictUrl(name)}"`;
  showClassNames(false);
  const choice = at("model-choice");
  choice.replaceChildren(...models.map((each) => new Option(each.name, each.name, false, each.name === name)));
  at("model-picker").hidden = models.length < 2;
}

function facts({ width, height, class_names, dataset, test_accuracy }) {
  return [
    class_names.length > 0 ? `Distinguishes ${class_names.length} classes` : "Distinguishes classes",
    `at ${width} × ${height} pixels.`,
    dataset === null ? "" : `Trained on ${dataset}`,
    test_accuracy === null ? "" : `${dataset === null ? "Test accuracy:" : "with a test accuracy of"} ${percent(test_accuracy)}`,
  ].filter(Boolean).join(" ").replace(/[^.]$/, "$&.");
}

function showClassNames(all) {
  const names = model.class_names ?? [];
  const shown = all ? names : names.slice(0, CLASS_NAMES_AT_FIRST);
  at("class-names").replaceChildren(
    ...shown.map((name) => {
      const item = document.createElement("li");
      item.textContent = name;
      return item;
    }),
  );
  at("all-class-names").hidden = shown.length === names.length;
  at("all-class-names").textContent = `All ${names.length} classes`;
}

async function refreshModels() {
  models = await describeModels();
  model = models.find(({ name }) => name === model.name) ?? models[0] ?? NO_MODEL;
  showModel();
}

// Readiness

function showStatus(state, text) {
  at("status").dataset.state = state;
  at("status").textContent = text;
}

async function untilAvailable({ model: name }) {
  for (let backoff_ms = FIRST_BACKOFF_MS; ; backoff_ms = Math.min(2 * backoff_ms, MAX_BACKOFF_MS)) {
    await new Promise((resume) => setTimeout(resume, backoff_ms));
    try {
      const reason = await notReadyBecause(name);
      if (reason === null) {
        await refreshModels();
        showStatus("ready", "Ready");
        return;
      }
      showStatus("waiting", `Not ready: ${reason}`);
    } catch {
      showStatus("offline", "No connection; trying again");
    }
  }
}

// Images

class Task {
  constructor(file) {
    this.model = model.name;
    this.file = file;
    this.card = new Card(file, () => this.enqueue({ left: 1, classified: 0, refused: 0 }));
  }

  /** `batch` counts the outcomes of the images that were dropped together. */
  enqueue(batch) {
    this.batch = batch;
    this.card.wait("Waiting");
    queue.add(this);
  }

  async send() {
    this.card.wait("Sending");
    const result = await classify(this.file, this.model);
    const find = () =>
      models.find(({ name, version }) => name === result.model.name && version === result.model.version);
    if (!find()) {
      await refreshModels(); // the version was swapped after the page was loaded
    }
    showStatus("ready", "Ready");
    this.card.showResult(result, find() ?? {});
    const [{ label, confidence }] = result.predictions;
    this.batch.classified += 1;
    this.finish(`${this.file.name}: ${label}, ${percent(confidence)}`);
  }

  wait(error) {
    this.card.wait("Waiting", error.message);
    showStatus("waiting", error.message);
  }

  fail(error) {
    this.card.fail(HEADLINES[error.status] ?? "No response", error.message, { retry: (error.status ?? 500) >= 500 });
    this.batch.refused += 1;
    this.finish(`${this.file.name}: ${error.message}`);
  }

  /** Announce the outcome: of one image its label, of several the counts. */
  finish(outcome) {
    this.batch.left -= 1;
    const { left, classified, refused } = this.batch;
    if (left === 0 && this.card.element.isConnected) {
      const refusals = refused > 0 ? `, ${refused} refused` : "";
      announce(classified + refused === 1 ? outcome : `${count(classified)} classified${refusals}`);
    }
  }
}

function addFiles(files) {
  if (files.length === 0 || at("drop-zone").hidden) {
    return;
  }
  const tasks = [...files].map((file) => new Task(file));
  cards = [...tasks.map(({ card }) => card), ...cards];
  at("cards").prepend(...tasks.map(({ card }) => card.element));
  showCount();
  const batch = { left: tasks.length, classified: 0, refused: 0 };
  tasks.forEach((task) => task.enqueue(batch));
}

function clear() {
  queue.clear();
  cards.forEach((card) => card.remove());
  cards = [];
  showCount();
  at("file-choice").focus();
}

function showCount() {
  at("results").hidden = cards.length === 0;
  at("results-title").textContent = count(cards.length);
}

function count(pictures) {
  return pictures === 1 ? "1 picture" : `${pictures} pictures`;
}

function announce(text) {
  at("announcement").textContent = text;
}

// Events

function carriesFiles(event) {
  return event.dataTransfer?.types.includes("Files");
}

let dragDepth = 0; // dragenter and dragleave fire for every element

function drag(event, change) {
  if (carriesFiles(event)) {
    event.preventDefault();
    dragDepth = Math.max(0, dragDepth + change);
    document.body.classList.toggle("dragging", dragDepth > 0);
  }
}

document.addEventListener("dragenter", (event) => drag(event, 1));
document.addEventListener("dragleave", (event) => drag(event, -1));
document.addEventListener("dragover", (event) => drag(event, 0));
document.addEventListener("drop", (event) => {
  drag(event, -dragDepth);
  if (carriesFiles(event)) {
    addFiles(event.dataTransfer.files);
  }
});
document.addEventListener("paste", (event) => addFiles(event.clipboardData?.files ?? []));
at("file-choice").addEventListener("change", (event) => {
  addFiles(event.target.files);
  event.target.value = ""; // so that choosing the same file again fires a change event
});
at("model-choice").addEventListener("change", (event) => {
  model = models.find(({ name }) => name === event.target.value);
  showModel();
  watchModel();
});
at("all-class-names").addEventListener("click", () => showClassNames(true));
at("clear").addEventListener("click", clear);
at("copy").addEventListener("click", async () => {
  // The clipboard is available on https and localhost only; elsewhere the line is selected, for copying by hand.
  getSelection().selectAllChildren(at("curl"));
  const copied = await navigator.clipboard?.writeText(at("curl").textContent).then(() => true, () => false);
  at("copy").textContent = copied ? "Copied" : "Selected";
  announce(copied ? "Copied" : "Selected; copy it with the keyboard");
  setTimeout(() => {
    at("copy").textContent = "Copy";
  }, COPIED_MS);
});

function watchModel() {
  if (model.problem === null) {
    showStatus("ready", "Ready");
  } else if (!model.loading) {
    showStatus("offline", model.available ? "Does not classify images" : "Not available");
  } else {
    showStatus("waiting", `Loading ${model.name}; pictures are queued`);
    queue.pause({ model: model.name }, new Unavailable(model.problem));
  }
}

showModel();
watchModel();
