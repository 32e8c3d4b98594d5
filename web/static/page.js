"use strict";
// The form is sent as the API takes it; what comes back is shown as text, never as HTML.

const $ = (id) => document.getElementById(id);
let chosen = [];

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function size(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  const kib = bytes / 1024;
  return kib < 1024 ? `${kib.toFixed(0)} KiB` : `${(kib / 1024).toFixed(1)} MiB`;
}

// Which field a file goes into. The decoders look at its content, whatever it is called.
function kindOf(file) {
  const kind = file.type.split("/")[0];
  if (kind === "image" || kind === "video" || kind === "audio") return kind;
  if (/\.(mp4|mkv|webm|mov|avi|flv|ts|m4v)$/i.test(file.name)) return "video";
  return /\.(wav|mp3|flac|ogg|oga|opus|m4a|aac)$/i.test(file.name) ? "audio" : "image";
}

// Chosen files -------------------------------------------------------------------------------

function add(files) {
  chosen.push(...files);
  showChosen();
}

function showChosen() {
  const list = $("chosen");
  for (const picture of list.querySelectorAll("img")) URL.revokeObjectURL(picture.src);
  list.replaceChildren(...chosen.map((file, i) => {
    const row = element("li");
    const kind = kindOf(file);
    if (kind === "image") {
      const picture = element("img");
      picture.alt = "";
      picture.addEventListener("error", () => picture.replaceWith(element("span", "kind", "file")));
      picture.src = URL.createObjectURL(file);
      row.append(picture);
    } else {
      row.append(element("span", "kind", kind));
    }
    const remove = element("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.addEventListener("click", () => { chosen.splice(i, 1); showChosen(); });
    row.append(element("span", "name", file.name), element("span", "size", size(file.size)), remove);
    return row;
  }));
}

// The answer ---------------------------------------------------------------------------------

function bars(list, tags, thresholds = new Map()) {
  list.replaceChildren(...tags.map((tag) => {
    const row = element("li");
    const track = element("span", "track");
    const fill = element("span", "fill");
    track.setAttribute("aria-hidden", "true");
    fill.style.width = `${(100 * tag.score).toFixed(1)}%`;
    track.append(fill);
    row.append(element("span", "name", tag.name), track, element("span", "score", tag.score.toFixed(3)));
    const threshold = tag.threshold ?? thresholds.get(tag.name);
    if (threshold !== undefined) {
      const mark = element("span", "mark");
      mark.style.left = `${(100 * threshold).toFixed(1)}%`;
      track.append(mark);
      row.title = `given from ${threshold.toFixed(3)} on`;
      row.classList.toggle("below", tag.score < threshold);
      row.append(element("span", "unseen", row.title));
    }
    return row;
  }));
}

function showResult(answer) {
  const scores = answer.scores || [];
  const known = new Map(scores.filter((each) => "threshold" in each).map((each) => [each.name, each.threshold]));
  bars($("tags"), answer.tags, known);
  $("no-tags").hidden = answer.tags.length > 0;
  bars($("near"), answer.near_misses || []);
  $("near-title").hidden = !answer.near_misses;
  $("marks").hidden = known.size === 0;
  $("modalities").tBodies[0].replaceChildren(...Object.entries(answer.modalities).map(([name, state]) => {
    const row = element("tr");
    const head = element("th", "", name);
    head.scope = "row";
    const failure = answer.failures[name];
    const why = failure ? (state === "ok" ? `one file: ${failure.message}` : failure.message) : "";
    row.append(head, element("td", state, state), element("td", "", why));
    return row;
  }));
  $("timings").replaceChildren(...Object.entries(answer.timings_ms).map(([stage, ms]) => {
    const pair = element("div");
    pair.append(element("dt", "", stage), element("dd", "", `${ms} ms`));
    return pair;
  }));
  bars($("scores"), scores);
  $("all").hidden = !answer.scores;
  $("all").open = answer.tags.length === 0;
  $("model").textContent = `${answer.model} ${answer.version}`;
  $("result").hidden = false;
}

function showError(error) {
  const box = $("error");
  box.replaceChildren(element("strong", "", error.type), ` ${error.message}`);
  if (error.reasons) {
    const list = element("ul");
    for (const [name, why] of Object.entries(error.reasons)) list.append(element("li", "", `${name}: ${why}`));
    box.replaceChildren(element("strong", "", error.type), " Nothing of this post could be used.", list);
  }
  box.hidden = false;
}

function clearAnswer(state) {
  $("result").hidden = true;
  $("error").hidden = true;
  $("state").textContent = state;
  $("state").hidden = !state;
}

async function send(event) {
  event.preventDefault();
  const form = new FormData($("post"));
  for (const file of chosen) form.append(`${kindOf(file)}s`, file, file.name);
  $("send").disabled = true;
  clearAnswer("Tagging …");
  $("answer").setAttribute("aria-busy", "true");
  try {
    const response = await fetch($("post").action, { method: "POST", body: form });
    const answer = await response.json();
    clearAnswer("");
    if (response.ok) showResult(answer); else showError(answer.error);
  } catch (error) {
    clearAnswer("");
    showError({ type: "No answer", message: "The server cannot be reached, or has ended the connection." });
  } finally {
    $("send").disabled = false;
    $("answer").removeAttribute("aria-busy");
    $("answer-title").focus({ preventScroll: false });
  }
}

// Whether the server is ready, until it is ---------------------------------------------------

async function lookAtServer() {
  try {
    const answer = await (await fetch("/readyz?only=workers")).json();
    $("server").textContent = answer.ready
      ? `Ready: ${answer.bundle.name} ${answer.bundle.version}`
      : `Not ready: ${answer.parts.workers}`;
    if (answer.ready) return;
  } catch (error) {
    $("server").textContent = "The server cannot be reached.";
  }
  setTimeout(lookAtServer, 2000);
}

// Dropping -----------------------------------------------------------------------------------

function drop(event) {
  event.preventDefault();
  $("drop").classList.remove("over");
  add(event.dataTransfer.files);
}

$("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";  // the same file may be chosen again
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", drop);
$("post").addEventListener("submit", send);
$("post").addEventListener("reset", () => { chosen = []; showChosen(); clearAnswer("Nothing has been tagged yet."); });
lookAtServer();
