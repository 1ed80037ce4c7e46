import { Refusal, Unavailable } from "./service.js";

const MAX_CONCURRENT = 4;
const MAX_ATTEMPTS = 5;

/**
 * Sends a few images concurrently. While the service is unavailable all of them wait for one call of
 * `untilAvailable(task, error)`, whose promise resolves when the service is ready.
 */
export class Queue {
  #waiting = [];
  #running = 0;
  #ready = Promise.resolve();
  #isPaused = false;
  #untilAvailable;

  constructor(untilAvailable) {
    this.#untilAvailable = untilAvailable;
  }

  /** A task has `send()`, `wait(error)` (it will be retried) and `fail(error)` (it will not). */
  add(task) {
    this.#waiting.push({ task, attempts: 0 });
    if (this.#running < MAX_CONCURRENT) {
      this.#running += 1;
      this.#run();
    }
  }

  clear() {
    this.#waiting = [];
  }

  /** Pause all tasks, unless they are paused already. */
  pause(task, error) {
    if (!this.#isPaused) {
      this.#isPaused = true;
      this.#ready = this.#untilAvailable(task, error).then(() => {
        this.#isPaused = false;
      });
    }
  }

  async #run() {
    await this.#ready;
    for (let entry = this.#waiting.shift(); entry; entry = this.#waiting.shift()) {
      await this.#attempt(entry);
      await this.#ready;
    }
    this.#running -= 1;
  }

  async #attempt(entry) {
    entry.attempts += 1;
    try {
      await entry.task.send();
    } catch (error) {
      if (error instanceof Unavailable && entry.attempts < MAX_ATTEMPTS) {
        this.#waiting.unshift(entry);
        entry.task.wait(error);
        this.pause(entry.task, error);
      } else {
        if (!(error instanceof Refusal || error instanceof Unavailable)) {
          console.error(error);
        }
        entry.task.fail(error);
      }
    }
  }
}
