// Speaks with the service: the token, errors in plain words, and events of jobs.
const KEY = "lumos-token";
export const base = new URL("v1/", document.baseURI);

export const token = () => sessionStorage.getItem(KEY);
export const setToken = value => value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY);

export class Trouble extends Error {
  constructor(message, status = 0, field = null) {
    super(message);
    this.status = status;
    this.field = field;
  }
}

// Seeds stay text: they may have more digits than a number of JavaScript.
export const parse = text => JSON.parse(text, (key, value, context) =>
  key === "seed" && typeof value === "number" ? context?.source ?? String(value) : value);

// Fields as the page calls them.
const LABELS = {
  num_frames: "frames", input_reference: "picture", num_inference_steps: "steps", guidance_scale: "guidance",
  history_ratio: "history ratio",
};
const plainly = text => text.replace(/\b[a-z]+(?:_[a-z]+)+\b/g, name => LABELS[name] ?? name);

async function explain(answer) {
  let error = {};
  try {
    error = JSON.parse(await answer.text()).error ?? {};
  } catch {
    // not of this service, perhaps of a proxy before it
  }
  const wait = answer.headers.get("retry-after"), again = wait ? ` Try again in ${wait} s.` : "";
  const said = error.message ? sentence(plainly(error.message)) : `The service answered with status ${answer.status}.`;
  const plain = {
    413: `What you sent is too large. ${said}`,
    429: `You asked too often. ${said}${again}`,
    503: `The service is busy. ${said}${again}`,
  }[answer.status] ?? said;
  return new Trouble(plain, answer.status, error.param ?? null);
}

export const sentence = text => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

export async function ask(path, options = {}) {
  const headers = token() ? {Authorization: `Bearer ${token()}`} : {};
  let answer;
  try {
    answer = await fetch(new URL(path, base), {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The service cannot be reached. Is it running, and are you online?");
  }
  if (!answer.ok) throw await explain(answer);
  return answer;
}

export const askJson = async (path, options) => parse(await (await ask(path, options)).text());

// Calls back with each event of a job until the stream ends.
async function follow(id, signal, onEvent) {
  const answer = await ask(`videos/${id}/events`, {signal});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n");
      const name = lines.find(line => line.startsWith("event: "))?.slice(7);
      const data = lines.filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
      if (name) onEvent(name, parse(data));
    }
  }
}

// A browser opens six connections to a host, all tabs together, and every stream holds one. So few jobs are watched
// at a time, and in turn where there are more; a stream tells everything from the job's beginning.
const STREAMS = 3, TURN_MS = 3000, PAUSE_MS = 2000;

export class Watcher {
  constructor(onEvent, onTrouble) {
    this.onEvent = onEvent;
    this.onTrouble = onTrouble;
    this.waiting = [];
    this.open = new Map();
    document.addEventListener("visibilitychange", () => this.#next());
  }

  watch(id) {
    if (this.waiting.includes(id) || this.open.has(id)) return;
    this.waiting.push(id);
    this.#next();
  }

  leave(id) {
    this.waiting = this.waiting.filter(each => each !== id);
    this.open.get(id)?.abort("left");
  }

  leaveAll() {
    for (const id of [...this.waiting, ...this.open.keys()]) this.leave(id);
  }

  #next() {
    if (document.hidden) {
      for (const control of this.open.values()) control.abort();
      return;
    }
    while (this.open.size < STREAMS && this.waiting.length) this.#begin(this.waiting.shift());
  }

  async #begin(id) {
    const control = new AbortController();
    this.open.set(id, control);
    const turn = setInterval(() => this.waiting.length && control.abort(), TURN_MS);
    let over = false, pause = 0;
    try {
      await follow(id, control.signal, (name, data) => {
        over ||= ["completed", "failed", "deleted"].includes(name);
        this.onEvent(id, name, data);
      });
    } catch (error) {
      if (error.status === 404) {
        over = true;
        this.onEvent(id, "deleted", {id});
      } else if (!control.signal.aborted) {
        over = error.status === 401;
        pause = PAUSE_MS;
        this.onTrouble(error instanceof Trouble ? error : new Trouble("The connection to the service was lost."));
      }
    }
    clearInterval(turn);
    if (pause) await new Promise(done => setTimeout(done, pause));
    this.open.delete(id);
    if (!over && control.signal.reason !== "left") this.waiting.push(id);
    this.#next();
  }
}
