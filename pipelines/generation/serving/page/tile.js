// One video of the list: what is seen of it, how far it is, and what can be done with it.
import {ask} from "./service.js";
import {fileName} from "./repeat.js";

export const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

// Strangers' text reaches the page as text alone: by properties and text nodes, never as HTML.
export const make = (name, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
};

export const time = seconds => new Date(seconds * 1000).toLocaleString([], {month: "short", day: "numeric", hour: "numeric", minute: "2-digit"});

export class Tile {
  constructor(video, actions) {
    this.actions = actions;  // what the page does: extend, repeat, remove, ahead, say, changed
    this.video = video;
    this.quarter = 0;  // of the latent frames, as last told aloud
    this.name = make("b", {textContent: `Seed ${video.seed}`});
    this.state = make("span", {className: "state"});
    this.screen = make("div", {className: "screen"});
    this.progress = make("progress", {max: 1, value: 0});
    this.progress.setAttribute("aria-label", `Progress of seed ${video.seed}`);
    this.buttons = make("div", {className: "buttons"});
    this.node = make("article", {className: "tile"}, this.screen, make("p", {className: "line"}, this.name, this.state),
      this.progress, this.buttons);
    this.node.setAttribute("aria-label", `Seed ${video.seed}`);
    const [width, height] = video.size.split("x").map(Number);
    this.screen.style.aspectRatio = `${width} / ${height}`;
    this.screen.classList.toggle("small", width < 256);
    this.buttonsFor = null;
    this.update(video);
  }

  get isOpen() {
    return ["queued", "in_progress"].includes(this.video.status);
  }

  get player() {
    return this.screen.querySelector("video");
  }

  update(video) {
    const before = this.video.status;
    this.video = video;
    this.node.dataset.status = video.status;
    this.progress.hidden = !this.isOpen;
    if (video.status === "in_progress") this.#tellDone(Math.floor(video.progress * video.latent_frames / 100 + 1e-6));
    else this.#tell();
    if (this.buttonsFor !== video.status) this.#showButtons();
    if (video.status === "failed") this.#showFailure();
    if (before !== video.status) {
      const word = {in_progress: "is being drawn", completed: "is done", failed: "failed"}[video.status];
      if (word) this.actions.say(`Seed ${video.seed} ${word}.`);
      this.actions.changed(this);
    }
  }

  // A latent frame arrived, and what the video looks like by now.
  draw({done, total, picture}) {
    if (picture && !this.player) {
      const words = `Seed ${this.video.seed} after ${done} of ${total} latent frames`;
      this.screen.replaceChildren(make("img", {src: `data:image/jpeg;base64,${picture}`, alt: words}));
    }
    if (!this.isOpen) return;
    this.#tellDone(done);
    const quarter = Math.floor(4 * done / total);
    if (quarter > this.quarter && done < total) this.actions.say(`Seed ${this.video.seed}: ${done} of ${total} latent frames.`);
    this.quarter = quarter;
  }

  #tellDone(done) {
    const total = this.video.latent_frames;
    this.done = Math.max(done, this.done ?? 0);
    this.progress.max = total;
    this.progress.value = this.done;
    this.state.textContent = this.done < total ? `drawing: ${this.done} of ${total} latent frames` : "writing the file";
  }

  #tell() {
    const {status} = this.video;
    if (status === "queued") {
      const ahead = this.actions.ahead(this.video);
      this.progress.removeAttribute("value");
      this.state.textContent = ahead ? `waiting, ${ahead} of yours before it` : "waiting for its turn";
    } else this.state.textContent = status === "completed" ? "done" : "failed";
  }

  recount() {
    if (this.video.status === "queued") this.#tell();
  }

  #showFailure() {
    const text = this.video.error?.message ?? "the service does not say why";
    const words = make("p", {textContent: text.charAt(0).toUpperCase() + text.slice(1)});
    this.screen.replaceChildren(make("div", {className: "why"}, make("b", {textContent: "There is no video"}), words));
    this.screen.style.aspectRatio = "auto";
  }

  #button(text, action, why = `${text}: seed ${this.video.seed}`) {
    const button = make("button", {type: "button", textContent: text});
    button.setAttribute("aria-label", why);
    button.addEventListener("click", () => action(button));
    return button;
  }

  #showButtons() {
    const hadFocus = this.buttons.contains(document.activeElement);
    this.buttonsFor = this.video.status;
    const remove = this.isOpen ? this.#button("Cancel", () => this.actions.remove(this))
      : this.#button("Delete", button => this.#sure(button));
    this.buttons.replaceChildren(remove);
    if (this.video.status !== "failed") this.buttons.prepend(this.#button("Repeat", () => this.actions.repeat(this)));
    if (this.video.status === "completed") {
      this.link = make("a", {textContent: "Download", className: "button"});
      this.buttons.prepend(this.#button("Continue", () => this.actions.extend(this.video)), this.link);
    }
    if (hadFocus) this.buttons.firstChild.focus();
  }

  // What cannot be undone asks once more, in place.
  #sure(button) {
    if (button.dataset.sure) {
      this.actions.remove(this);
      return;
    }
    button.dataset.sure = "yes";
    button.textContent = "Delete it?";
    button.setAttribute("aria-label", `Press again to delete seed ${this.video.seed}`);
    const back = () => {
      delete button.dataset.sure;
      button.textContent = "Delete";
      button.setAttribute("aria-label", `Delete: seed ${this.video.seed}`);
    };
    button.addEventListener("blur", back, {once: true});
  }

  // Fetches the file, which a plain address could not show where a token is needed.
  async load() {
    if (this.video.status !== "completed" || this.loading) return;
    this.loading = true;
    try {
      const blob = await (await ask(`videos/${this.video.id}/content`)).blob();
      this.url = URL.createObjectURL(blob);
      this.suffix = blob.type.split("/")[1] || "mp4";
      const words = `Seed ${this.video.seed}: ${this.video.prompt}`;
      const shown = blob.type.startsWith("video/")
        ? make("video", {src: this.url, muted: true, loop: true, playsInline: true})
        : make("img", {src: this.url, alt: words});
      shown.setAttribute("aria-label", words);
      this.screen.replaceChildren(shown);
      Object.assign(this.link, {href: this.url, download: fileName(this.video, this.suffix)});
      this.actions.changed(this);
    } catch (error) {
      this.loading = error.status === 404;
      this.state.textContent = error.message;
    }
  }

  drop() {
    if (this.url) URL.revokeObjectURL(this.url);
    this.node.remove();
  }
}
