import { Refusal, Unavailable } from "./service.js";

const LANES = 4;
const MOST_ATTEMPTS = 5;

/**
 * Sends a few pictures at a time. While the service is unavailable all of them wait, and one question at a time is
 * asked: `untilAvailable(task, error)`, whose promise is kept when the service can answer.
 */
export class Queue {
  #waiting = [];
  #lanes = 0;
  #open = Promise.resolve();
  #closed = false;
  #untilAvailable;

  constructor(untilAvailable) {
    this.#untilAvailable = untilAvailable;
  }

  /** A task has `send()`, `wait(error)` for when it must, and `fail(error)` for when it is given up. */
  add(task) {
    this.#waiting.push({ task, attempts: 0 });
    if (this.#lanes < LANES) {
      this.#lanes += 1;
      this.#run();
    }
  }

  clear() {
    this.#waiting = [];
  }

  /** Let everything wait; where it already does, this changes nothing. */
  pause(task, error) {
    if (!this.#closed) {
      this.#closed = true;
      this.#open = this.#untilAvailable(task, error).then(() => {
        this.#closed = false;
      });
    }
  }

  async #run() {
    await this.#open;
    for (let entry = this.#waiting.shift(); entry; entry = this.#waiting.shift()) {
      await this.#attempt(entry);
      await this.#open;
    }
    this.#lanes -= 1;
  }

  async #attempt(entry) {
    entry.attempts += 1;
    try {
      await entry.task.send();
    } catch (error) {
      if (error instanceof Unavailable && entry.attempts < MOST_ATTEMPTS) {
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
