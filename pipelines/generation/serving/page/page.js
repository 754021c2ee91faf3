// The page: a form that makes videos, and the list of those that there are.
import {ask, askJson, setToken, token, Trouble, Watcher} from "./service.js";
import {curl, python} from "./repeat.js";
import {make, still, Tile, time} from "./tile.js";

const at = id => document.getElementById(id);
const REFRESH_MS = 10000, PAGE = 12, MAX_VIDEOS = 8;
const form = at("make"), dialog = at("continue");
const tiles = new Map();  // by id of the video
const groups = new Map();  // by id of the first video of a request
let models = [], last = null, extending = null;

const say = text => { at("said").textContent = text; };

function show(node, error) {
  for (const input of node.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  const problem = node.querySelector(".problem");
  problem.hidden = !error;
  problem.textContent = error?.message ?? "";
  const input = error?.field && node.elements?.[error.field];
  if (!(input instanceof HTMLElement)) return;
  input.setAttribute("aria-invalid", "true");
  if (input.closest("details")) input.closest("details").open = true;
  input.focus();
}

function trouble(error) {
  if (error?.status === 401) return askForToken(error);
  at("trouble").hidden = !error;
  at("trouble").textContent = error?.message ?? "";
}

function askForToken() {
  const wrong = token() ? new Trouble("This token is not accepted. Look for a missing or a wrong letter.") : null;
  setToken(null);
  forgetAll();
  at("work").hidden = at("forget").hidden = true;
  at("token").hidden = false;
  at("about").textContent = "";
  show(at("token"), wrong);
  at("token").elements.token.focus();
}

// The form.

const model = () => models.find(each => each.id === form.elements.model.value) ?? models[0];

function describe() {
  const {defaults, limits, format} = model(), inputs = form.elements;
  const usual = {size: defaults.size, num_frames: defaults.frames, num_inference_steps: defaults.steps,
    guidance_scale: defaults.guidance_scale, history_ratio: defaults.history_ratio};
  for (const [name, value] of Object.entries(usual)) inputs[name].placeholder = value ?? "";
  for (const name of ["size", "num_frames"]) inputs[name].value ||= usual[name] ?? "";
  inputs.num_inference_steps.max = limits.max_steps;
  const sizes = new Set([defaults.size, ...(limits.trained_on ?? []).map(each => each.size)].filter(Boolean));
  at("sizes").replaceChildren(...[...sizes].map(size => new Option(size)));
  const words = `${model().id}: ${(model().parameters / 1e6).toFixed(1)} million parameters`;
  at("about").textContent = defaults.size ? `${words}, made for ${defaults.size} px at ${defaults.fps} fps` : words;
  inputs.num_frames.max = format === "png" ? 1 : "";
  tellLength();
}

function tellLength() {
  const frames = Number(form.elements.num_frames.value), {fps} = model().defaults;
  const below = Math.max(1, 4 * Math.floor((frames - 1) / 4) + 1);
  at("length").textContent = !frames ? "1, 5, 9, 13 …" : below !== frames ? `use ${below} or ${below + 4}`
    : frames === 1 ? "an image" : `${fps ? `${(frames / fps).toFixed(2)} s; ` : ""}next: ${frames - 4}, ${frames + 4}`;
  const n = Number(form.elements.n.value), what = frames === 1 ? "image" : "video";
  at("go").textContent = n > 1 ? `Make ${n} ${what}s` : `Make the ${what}`;
}

function showPicture() {
  const [file] = form.elements.input_reference.files, image = at("given");
  URL.revokeObjectURL(image.src);
  image.hidden = !file?.type.startsWith("image/");
  at("drop").hidden = !file;
  if (image.hidden) image.removeAttribute("src");
  else image.src = URL.createObjectURL(file);
}

// The fields that are filled in, after a look at what the service could only answer with a riddle.
function filled(node, extra = {}) {
  const body = new FormData();
  for (const input of node.elements) {
    if (!input.name) continue;
    if (input.validity.badInput) throw new Trouble(`${input.labels[0].firstChild.textContent.trim()}: type a number.`, 0, input.name);
    const value = input.type === "file" ? input.files[0] : input.value.trim();
    if (value) body.append(input.name, value);
  }
  if (!body.has("prompt")) throw new Trouble("Type a prompt first: what is the video to show?", 0, "prompt");
  for (const [name, value] of Object.entries(extra)) body.append(name, value);
  return body;
}

async function send(node, path, extra) {
  const button = node.querySelector(".first"), text = button.textContent;
  show(node, null);
  button.disabled = true;
  button.textContent = "Sending …";
  try {
    const body = filled(node, extra), answer = await ask(path, {method: "POST", body});
    const video = JSON.parse(await answer.text()), file = body.get("input_reference");
    if (file) for (const id of video.ids) sessionStorage.setItem(`picture ${id}`, file.name);
    const warning = answer.headers.get("x-lumos-warning");
    if (node === form) {
      form.querySelector(".warning").hidden = !warning;
      form.querySelector(".warning").textContent = warning ? `It is made, but may look bad: ${warning}.` : "";
    }
    await Promise.all(video.ids.map(async id => put(await askJson(`videos/${id}`))));
    say(video.ids.length > 1 ? `${video.ids.length} videos are in the queue.` : "The video is in the queue.");
    groups.get(video.ids[0])?.node.scrollIntoView({block: "nearest", behavior: still ? "auto" : "smooth"});
    refreshQueue();
    return true;
  } catch (error) {
    if (error.status === 401) askForToken();
    else show(node, error);
    return false;
  } finally {
    button.disabled = false;
    button.textContent = text;
  }
}

// The list.

const watcher = new Watcher((id, name, data) => {
  const tile = tiles.get(id);
  if (!tile) return;
  trouble(null);
  if (name === "deleted") drop(tile);
  else if (name === "progress") tile.draw(data);
  else tile.update(data);
}, trouble);

const seen = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) if (isIntersecting) target.tile.load();
}, {rootMargin: "200px"});

let asking;
const actions = {
  say,
  ahead: video => [...tiles.values()].filter(tile => tile.isOpen && tile.video.id < video.id).length,
  repeat: tile => {
    showLines(tile);
    at("repeat").showModal();
  },
  changed: tile => {
    for (const each of tiles.values()) each.recount();
    if (tile.video.status === "completed" && tile.node.isConnected) {
      seen.unobserve(tile.node);  // to be told anew where it is
      seen.observe(tile.node);
    }
    groups.get(tile.video.ids[0])?.refresh();
    clearTimeout(asking);
    asking = setTimeout(refreshQueue, 300);
  },
  extend: video => {
    extending = video;
    const {elements} = dialog.querySelector("form");
    elements.prompt.value = video.prompt;
    elements.num_frames.value = 4 * Math.max(1, Math.floor((video.num_frames - 1) / 8));
    elements.seed.value = "";
    show(dialog.querySelector("form"), null);
    dialog.showModal();
  },
  remove: async tile => {
    try {
      watcher.leave(tile.video.id);
      await ask(`videos/${tile.video.id}`, {method: "DELETE"});
    } catch (error) {
      if (error.status !== 404) {
        if (tile.isOpen) watcher.watch(tile.video.id);
        trouble(error);
        return;
      }
    }
    say(`Seed ${tile.video.seed} is deleted.`);
    const next = tile.node.nextElementSibling ?? tile.node.previousElementSibling;
    drop(tile);
    (next?.querySelector("button") ?? at("videos")).focus();
  },
};

// What makes a video again, to copy.
async function showLines({video, suffix}) {
  const lines = at("lines"), note = at("note");
  const tell = text => {
    note.hidden = !text;
    note.textContent = text;
  };
  lines.hidden = true;
  let source = null;
  if (video.remixed_from_video_id) {
    tell("One moment …");
    const id = video.remixed_from_video_id;
    source = tiles.get(id)?.video ?? await askJson(`videos/${id}`).catch(() => null);
    if (!source) return tell("It cannot be repeated: the video that it goes on with is gone.");
  }
  const given = !source && video.num_given > 0;
  const kind = video.num_given > 1 ? "clip" : "picture";
  const picture = given ? sessionStorage.getItem(`picture ${video.id}`) ?? kind.toUpperCase() : null;
  tell(given ? `It needs the ${kind} again, which ${picture} stands for.` : "");
  at("curl").textContent = curl(video, source, picture, suffix);
  at("python").textContent = python(video, source, picture, suffix);
  at("with-token").hidden = !token();
  lines.hidden = false;
}

async function copy(button) {
  const pre = at(button.dataset.copy), before = button.textContent;
  try {
    await navigator.clipboard.writeText(pre.textContent);
    button.textContent = "Copied";
  } catch {  // without https a browser may refuse; then the text is selected, to be copied by hand
    getSelection().selectAllChildren(pre);
    button.textContent = "Selected: now copy it";
  }
  say(button.textContent);
  setTimeout(() => { button.textContent = before; }, 2500);
}

// Videos of one request, side by side, which play in step.
class Group {
  constructor(video) {
    this.key = video.ids[0];
    this.grid = make("div", {className: "tiles"});
    this.button = make("button", {type: "button", textContent: "Play"});
    this.button.setAttribute("aria-label", `Play or pause: ${video.prompt.slice(0, 80)}`);
    this.scrub = make("input", {type: "range", min: 0, max: 1000, value: 0});
    this.scrub.setAttribute("aria-label", "Place in the videos of this prompt");
    this.bar = make("div", {className: "together row", hidden: true}, this.button, this.scrub);
    this.button.addEventListener("click", () => this.#play(this.button.textContent === "Play"));
    this.scrub.addEventListener("input", () => {
      this.#play(false);
      this.#seek(this.scrub.value / 1000);
    });
    const facts = [video.size, video.num_frames === 1 ? "an image" : `${video.num_frames} frames, ${video.seconds} s`,
      `${video.num_inference_steps} steps`, `guidance ${video.guidance_scale}`, `history ratio ${video.history_ratio}`];
    if (video.shortcuts) facts.push("shortcuts");
    if (video.remixed_from_video_id) facts.push("goes on with an earlier video");
    else if (video.num_given) facts.push(video.num_given > 1 ? "starts from a clip" : "starts from a picture");
    if (models.length > 1) facts.push(video.model);
    facts.push(`kept until ${time(video.expires_at)}`);
    this.node = make("section", {className: "card group"}, make("h3", {textContent: video.prompt}),
      make("p", {className: "soft", textContent: facts.join(" · ")}), this.grid, this.bar);
    const rows = [...groups.values()].sort((a, b) => a.key < b.key ? 1 : -1);
    const before = rows.find(row => row.key < this.key);
    at("groups").insertBefore(this.node, before?.node ?? null);
  }

  #players() {
    return [...this.grid.querySelectorAll("video")];
  }

  #seek(share) {
    for (const player of this.#players()) player.currentTime = share * Math.max(0, (player.duration || 0) - 0.001);
  }

  #play(start) {
    for (const player of this.#players()) start ? player.play().catch(() => {}) : player.pause();
    this.button.textContent = start ? "Pause" : "Play";
  }

  add(tile) {
    const place = tile.video.ids.indexOf(tile.video.id);
    const next = [...this.grid.children].find(node => node.tile.video.ids.indexOf(node.tile.video.id) > place);
    this.grid.insertBefore(tile.node, next ?? null);
  }

  // A video came or went: all begin anew, so that they are in step.
  refresh() {
    const [first] = this.#players();
    this.bar.hidden = !first;
    if (!first || this.#players().length === this.known) return;
    this.known = this.#players().length;
    first.ontimeupdate = () => {
      if (!first.paused) this.scrub.value = 1000 * first.currentTime / first.duration;
    };
    this.#seek(0);
    this.#play(!still);
  }
}

function put(video) {
  const known = tiles.get(video.id);
  if (known) {
    if (known.video.status !== video.status) known.update(video);
    return;
  }
  const tile = new Tile(video, actions);
  tile.node.tile = tile;
  tiles.set(video.id, tile);
  const key = video.ids[0];
  if (!groups.has(key)) groups.set(key, new Group(video));
  groups.get(key).add(tile);
  at("empty").hidden = true;
  seen.observe(tile.node);
  if (tile.isOpen) watcher.watch(video.id);
}

function drop(tile) {
  const key = tile.video.ids[0], group = groups.get(key);
  watcher.leave(tile.video.id);
  tiles.delete(tile.video.id);
  tile.drop();
  group.refresh();
  if (!group.grid.children.length) {
    group.node.remove();
    groups.delete(key);
  }
  at("empty").hidden = tiles.size > 0;
  for (const each of tiles.values()) each.recount();
}

function forgetAll() {
  watcher.leaveAll();
  for (const tile of [...tiles.values()]) drop(tile);
  at("empty").hidden = true;
}

async function list(after) {
  const page = await askJson(`videos?limit=${PAGE}${after ? `&after=${encodeURIComponent(after)}` : ""}`);
  page.data.forEach(put);
  if (after || last === null) {
    last = page.last_id;
    at("older").hidden = !page.has_more;
  }
  at("empty").hidden = tiles.size > 0;
}

async function refreshQueue() {
  try {
    const {queued, running} = await askJson("../ready");
    at("queue").textContent = queued || running
      ? `The model draws ${running} now${queued ? ` and ${queued} wait${queued > 1 ? "" : "s"}` : ", none waits"}.` : "The model is free.";
  } catch (error) {
    at("queue").textContent = error.message;
  }
}

async function refresh() {
  if (document.hidden || at("work").hidden) return;
  try {
    await Promise.all([refreshQueue(), list()]);
    trouble(null);
  } catch (error) {
    trouble(error);
  }
}

async function begin() {
  try {
    models = (await askJson("models")).data;
  } catch (error) {
    if (error.status === 401) return askForToken();
    at("about").textContent = error.message;
    setTimeout(begin, REFRESH_MS);
    return;
  }
  form.elements.model.replaceChildren(...models.map(each => new Option(each.id)));
  at("which").hidden = models.length < 2;
  at("token").hidden = true;
  at("work").hidden = false;
  at("forget").hidden = !token();
  last = null;
  describe();
  await refresh();
}

form.elements.n.append(...Array.from({length: MAX_VIDEOS}, (_, place) => new Option(place + 1)));
form.addEventListener("submit", event => {
  event.preventDefault();
  send(form, "videos");
});
form.elements.prompt.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
form.elements.model.addEventListener("change", () => {
  form.elements.size.value = form.elements.num_frames.value = "";
  describe();
});
form.elements.num_frames.addEventListener("input", tellLength);
form.elements.n.addEventListener("change", tellLength);
form.elements.input_reference.addEventListener("change", showPicture);
at("drop").addEventListener("click", () => {
  form.elements.input_reference.value = "";
  showPicture();
  form.elements.input_reference.focus();
});
at("token").addEventListener("submit", event => {
  event.preventDefault();
  setToken(at("token").elements.token.value.trim());
  at("token").elements.token.value = "";
  begin().then(() => at("work").hidden || form.elements.prompt.focus());
});
at("forget").addEventListener("click", () => {
  setToken(null);
  askForToken();
});
at("older").addEventListener("click", () => list(last).catch(trouble));
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
dialog.querySelector("form").addEventListener("submit", async event => {
  if (event.submitter?.value === "no") return;
  event.preventDefault();
  if (await send(event.target, "videos/extensions", {"video[id]": extending.id})) dialog.close();
});
document.addEventListener("visibilitychange", refresh);
setInterval(refresh, REFRESH_MS);
begin();
