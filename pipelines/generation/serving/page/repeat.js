// The lines that make a video again: for a shell, and for OpenAI's Python client.
import {base, token} from "./service.js";

const quoted = text => `'${text.replaceAll("'", `'\\''`)}'`;
const url = path => new URL(path, base).href;

// What decides the video, as fields of a request; numbers are text, as of the seed no digit may be lost.
function fields(video, source) {
  const shared = {
    prompt: video.prompt,
    model: video.model,
    seed: video.seed,
    num_inference_steps: String(video.num_inference_steps),
    guidance_scale: String(video.guidance_scale),
    history_ratio: String(video.history_ratio),
    temperature: String(video.temperature),
    draw_temperature: String(video.draw_temperature),
    shortcuts: JSON.stringify(video.shortcuts ?? {order: "confidence"}),
  };
  if (source) return {...shared, "video[id]": source.id, num_frames: String(video.num_frames - source.num_frames)};
  const asked = {...shared, size: video.size, num_frames: String(video.num_frames), fps: String(video.fps)};
  if (video.num_given) asked.num_given = String(video.num_given);
  if (video.motion !== null) asked.motion = String(video.motion);
  return asked;
}

export const fileName = (video, suffix = "mp4") => `video-${video.seed}.${suffix}`;

export function curl(video, source, picture, suffix) {
  const parts = ["curl --fail-with-body"];
  if (token()) parts.push(`-H "Authorization: Bearer $LUMOS_TOKEN"`);
  for (const [name, value] of Object.entries(fields(video, source))) parts.push(`--form-string ${quoted(`${name}=${value}`)}`);
  if (picture) parts.push(`-F ${quoted(`input_reference=@"${picture.replace(/["\\]/g, "\\$&")}"`)}`);
  return source
    ? [...parts, url("videos/extensions")].join(" ")
    : [...parts, `-o ${quoted(fileName(video, suffix))}`, url("videos/sync")].join(" ");
}

export function python(video, source, picture, suffix) {
  const text = JSON.stringify, asked = fields(video, source);
  const number = name => `"${name}": ${asked[name]}`;
  const numbers = ["seed", "num_frames", "num_inference_steps", "guidance_scale", "history_ratio", "temperature",
    "draw_temperature", "shortcuts", "fps", "num_given", "motion"].filter(name => name in asked);
  const key = token() ? `os.environ["LUMOS_TOKEN"]` : `"none"`;
  const begin = `${token() ? "import os, openai" : "import openai"}\nclient = openai.OpenAI(base_url=${text(base.href.replace(/\/$/, ""))}, api_key=${key})`;
  const made = source
    ? `video = client.videos.poll(client.post("/videos/extensions", cast_to=openai.types.Video, body={"prompt": ${text(asked.prompt)}, "model": ${text(asked.model)}, "video": {"id": ${text(source.id)}}, ${numbers.map(number).join(", ")}}).id)`
    : `video = client.videos.create_and_poll(prompt=${text(asked.prompt)}, model=${text(asked.model)}, size=${text(asked.size)}, `
      + (picture ? `input_reference=open(${text(picture)}, "rb"), ` : "")
      + `extra_body={${numbers.map(number).join(", ")}})`;
  return `${begin}\n${made}\nclient.videos.download_content(video.id).write_to_file(${text(fileName(video, suffix))})`;
}
