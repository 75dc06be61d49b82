// The page: a prompt and its answer on one side, the engine that makes it on the other. Whatever a model or another
// user wrote reaches the document through textContent only.

import { GroupMap, colourSequences, hueOf, unpackRanges } from "./blocks.js";
import { AnswerError, ask, chunks, key } from "./stream.js";

const POLL = 500; // milliseconds between two looks
const RETRY = 2000; // after a look that failed
const RATE_WINDOW = 2; // seconds that a rate is averaged over
const HISTORY = 60; // seconds of the sparkline
const MOST_ROWS = 12; // sequences listed by name

const at = (id) => document.getElementById(id);
const element = (name, text = "", className = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};

// ---- the key ------------------------------------------------------------------------------------------------

function askForKey(refused) {
  key.set("");
  at("key-form").hidden = false;
  at("key-error").textContent = refused ? "The server does not know this key." : "";
  at("forget-key").hidden = true;
  setConnection("wait", "waiting for a key");
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  at("key").value = "";
  at("key-form").hidden = true;
  look();
});

at("forget-key").addEventListener("click", () => {
  key.set("");
  location.reload(); // what the key opened goes with it
});

// ---- a prompt and its answer --------------------------------------------------------------------------------

let conversation = [];
let running = null; // AbortController of the stream

function addTurn(role, text) {
  const turn = element("article", "", "turn");
  const body = element("p");
  turn.append(element("h3", role), body);
  if (role === "completion") body.append(element("span", text, "given"));
  else body.textContent = text;
  at("transcript").querySelector(".empty")?.remove();
  at("transcript").append(turn);
  at("transcript").scrollTop = at("transcript").scrollHeight;
  return turn;
}

/** Text that grows: one node, added to at most once a frame. */
function grower(turn) {
  const node = document.createTextNode("");
  turn.querySelector("p").append(node);
  const transcript = at("transcript");
  let pending = "";
  const write = () => {
    if (!pending) return;
    const atEnd = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 40;
    node.appendData(pending);
    pending = "";
    if (atEnd) transcript.scrollTop = transcript.scrollHeight;
  };
  return {
    add(text) {
      if (!pending) requestAnimationFrame(write);
      pending += text;
    },
    end() {
      write();
      return node.data;
    },
  };
}

function requestFor(mode, prompt) {
  const limits = { max_tokens: at("max-tokens").valueAsNumber, temperature: at("temperature").valueAsNumber };
  if (mode === "completion") return ["v1/completions", { prompt, ...limits }];
  conversation.push({ role: "user", content: prompt });
  return ["v1/chat/completions", { messages: conversation, ...limits }];
}

async function send() {
  const prompt = at("prompt").value;
  if (running || !prompt.trim() || !at("prompt-form").reportValidity()) return;
  const mode = at("mode").value;
  if (mode === "chat") addTurn("user", prompt);
  const turn = addTurn(mode === "chat" ? "assistant" : "completion", mode === "chat" ? "" : prompt);
  const answer = grower(turn);
  const [path, body] = requestFor(mode, prompt);
  const times = { sent: performance.now(), first: 0, pieces: 0 };
  let usage = null;
  let outcome = "";
  begin(turn);
  at("prompt").value = "";
  try {
    for await (const chunk of chunks(path, body, running.signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      const text = choice?.delta ? choice.delta.content : choice?.text;
      if (text) {
        times.first ||= performance.now();
        times.pieces += 1;
        answer.add(text);
      }
      if (choice?.finish_reason === "length") outcome = "cut at max tokens";
    }
  } catch (error) {
    outcome = error.name === "AbortError" ? "stopped" : `failed: ${error.message}`;
    if (error instanceof AnswerError && error.status === 401) askForKey(true);
  } finally {
    const text = answer.end();
    if (mode === "chat") {
      if (text) conversation.push({ role: "assistant", content: text });
      else conversation.pop(); // a question that nothing answered is not part of the conversation
    }
    end(turn, tell(usage, times, outcome));
  }
}

function begin(turn) {
  running = new AbortController();
  turn.classList.add("live");
  at("transcript").setAttribute("aria-busy", "true");
  at("send").disabled = true;
  at("stop").disabled = false;
  at("usage").textContent = "";
}

function end(turn, text) {
  running = null;
  turn.classList.remove("live");
  at("transcript").setAttribute("aria-busy", "false");
  at("send").disabled = false;
  at("stop").disabled = true;
  at("usage").textContent = text;
}

function tell(usage, times, outcome) {
  const parts = outcome ? [outcome] : [];
  if (times.first) {
    const seconds = (performance.now() - times.first) / 1000;
    const tokens = usage?.completion_tokens ?? times.pieces;
    parts.push(`${tokens} ${usage ? "tokens" : "pieces"} generated`);
    if (tokens > 1 && seconds > 0) parts.push(`${(tokens / seconds).toFixed(1)} a second`);
    parts.push(`first after ${Math.round(times.first - times.sent)} ms`);
  }
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    parts.push(`${usage.prompt_tokens} prompt tokens${cached ? `, ${cached} of them from cached blocks` : ""}`);
  }
  return parts.join(" · ");
}

at("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  at("transcript").replaceChildren(element("p", "A new conversation.", "empty"));
  at("usage").textContent = "";
  at("prompt").focus();
});

// ---- the engine ---------------------------------------------------------------------------------------------

let samples = []; // {time, generated} for the rate
let rates = []; // {time, rate} for the sparkline
let maps = [];
let timer = 0;
let looking = false;
let latest = null;

function setConnection(state, text) {
  at("dot").dataset.state = state;
  if (at("connection").textContent !== text) at("connection").textContent = text;
}

async function look() {
  clearTimeout(timer);
  if (looking || document.hidden) return;
  looking = true;
  let wait = POLL;
  try {
    show(await (await ask("kvpage/blocks")).json());
    setConnection("good", "live");
    at("forget-key").hidden = !key.get();
  } catch (error) {
    wait = RETRY;
    if (error.status === 401) {
      wait = 0;
      askForKey(true);
    } else {
      setConnection("bad", error instanceof AnswerError ? error.message : "no connection to the server");
    }
  } finally {
    looking = false;
  }
  if (wait) timer = setTimeout(look, wait);
}

function show(answer) {
  const { engine } = answer;
  at("model").textContent = `${answer.model} · ${answer.version}`;
  at("running").textContent = engine.running.toLocaleString();
  at("waiting").textContent = engine.waiting.toLocaleString();
  at("kv-usage").textContent = `${(100 * engine.kv_usage).toFixed(1)}%`;
  at("prefix-hits").textContent = engine.prefix_queries
    ? `${Math.round((100 * engine.prefix_hits) / engine.prefix_queries)}%` : "–";
  showRate(answer.time, engine.generated_tokens);
  if (latest?.map_time !== answer.map_time) showMaps(answer);
  latest = answer;
}

function showRate(time, generated) {
  if (samples.length && time < samples.at(-1).time) samples = rates = []; // the server was started anew
  if (samples.length && time === samples.at(-1).time) return;
  samples = [...samples.filter((sample) => time - sample.time <= RATE_WINDOW + 1), { time, generated }];
  const since = samples.find((sample) => time - sample.time <= RATE_WINDOW);
  const rate = since.time < time ? (generated - since.generated) / (time - since.time) : 0;
  rates = [...rates.filter((sample) => time - sample.time <= HISTORY), { time, rate }];
  at("rate").textContent = rate.toFixed(rate < 100 ? 1 : 0);
  drawRates();
}

function drawRates() {
  const canvas = at("sparkline");
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  if (!rates.length) return;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const most = Math.max(1, ...rates.map(({ rate }) => rate));
  const now = rates.at(-1).time;
  const x = ({ time }) => width - 2 - ((now - time) / HISTORY) * (width - 4);
  const y = ({ rate }) => height - 2 - (rate / most) * (height - 6);
  context.beginPath();
  context.moveTo(x(rates[0]), height);
  for (const sample of rates) context.lineTo(x(sample), y(sample));
  context.lineTo(x(rates.at(-1)), height);
  context.globalAlpha = 0.18;
  context.fillStyle = style.getPropertyValue("--accent");
  context.fill();
  context.globalAlpha = 1;
  context.beginPath();
  for (const sample of rates) context.lineTo(x(sample), y(sample));
  context.strokeStyle = style.getPropertyValue("--accent");
  context.lineWidth = 1.5;
  context.stroke();
  canvas.setAttribute("aria-label", `Tokens per second, the last minute: at most ${most.toFixed(0)}`);
}

function showMaps(answer) {
  const { groups, sequences } = answer;
  const sum = (state) => groups.reduce((total, group) => total + group[state], 0);
  for (const state of ["used", "shared", "cached", "free"]) at(`count-${state}`).textContent = sum(state).toLocaleString();
  at("map-summary").textContent = `${sum("total").toLocaleString()} blocks of ${answer.block_size} tokens`;
  while (maps.length < groups.length) maps.push(new GroupMap(at("maps"), showDetails));
  while (maps.length > groups.length) maps.pop().remove();
  colourSequences(sequences);
  groups.forEach((group, index) => maps[index].update(group, sequences, answer.block_size, groups.length > 1));
  showSequences(answer);
}

const HINT = at("block-details").textContent;

function showDetails(text) {
  const details = at("block-details");
  if (details.textContent !== (text || HINT)) details.textContent = text || HINT; // what did not change is not said again
}

function showSequences({ sequences, engine }) {
  const rows = sequences.slice(0, MOST_ROWS).map((sequence) => {
    const row = element("tr");
    const name = element("td");
    const swatch = element("i", "", "swatch");
    swatch.style.background = `hsl(${hueOf(sequence)} 60% var(--block-light))`;
    name.append(swatch, `${sequence.request_id} / ${sequence.choice}`);
    const held = unpackRanges(sequence.blocks[0] ?? "").length;
    row.append(name, element("td", sequence.state), element("td", `${sequence.computed} of ${sequence.known}`), element("td", held));
    return row;
  });
  at("sequences").querySelector("tbody").replaceChildren(...rows);
  at("sequences").hidden = !rows.length;
  const more = engine.running + engine.waiting - rows.length;
  at("more-sequences").textContent = more > 0 ? `and ${more.toLocaleString()} more` : "";
}

at("save-svg").addEventListener("click", async () => {
  try {
    const picture = await (await ask("kvpage/blocks?format=svg")).blob();
    const link = element("a");
    link.href = URL.createObjectURL(picture);
    link.download = "kv-blocks.svg";
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) {
    at("block-details").textContent = error.message;
  }
});

at("plan").addEventListener("toggle", async () => {
  if (!at("plan").open) return;
  const body = at("plan").querySelector("tbody");
  try {
    const plan = await (await ask("kvpage/plan")).json();
    body.replaceChildren(...plan.values.map(({ name, value, reason }) => {
      const row = element("tr");
      const number = (part) => (typeof part === "number" ? part.toLocaleString() : String(part));
      row.append(element("td", name), element("td", [value].flat().map(number).join(" + ")), element("td", reason ?? ""));
      return row;
    }));
    at("notes").replaceChildren(...plan.notes.map((note) => element("li", note)));
  } catch (error) {
    at("notes").replaceChildren(element("li", error.message));
  }
});

function redraw() {
  for (const map of maps) map.draw();
  drawRates();
}

new ResizeObserver(redraw).observe(at("maps"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.addEventListener("visibilitychange", () => at("key-form").hidden && look());
if (document.querySelector("meta[name=kvpage-key]").content === "needed" && !key.get()) askForKey(false);
else look();
