// The map of one KV group: a canvas with one cell a block, as it comes packed from /kvpage/blocks.

const STATES = { f: "free", c: "cached", u: "used", U: "used", s: "shared", S: "shared" };
const SIZES = [[700, 18], [3000, 13], [12000, 9], [60000, 6], [Infinity, 4]]; // blocks up to, pixels of a cell
const TALLEST = 16000; // device pixels that browsers give a canvas

/** "3u1s" as "uuus": the letter of block n at n - 1. */
export function unpackRuns(text) {
  let letters = "";
  for (const [, count, letter] of text.matchAll(/(\d+)([a-zA-Z])/g)) letters += letter.repeat(Number(count));
  return letters;
}

/** "1-3 7" as [1, 2, 3, 7]. */
export function unpackRanges(text) {
  const blocks = [];
  for (const part of text.split(" ")) {
    if (!part) continue;
    const [first, last = first] = part.split("-").map(Number);
    for (let number = first; number <= last; number++) blocks.push(number);
  }
  return blocks;
}

const GOLDEN_ANGLE = 137.508; // degrees of hue between neighbours: any number of colours stays apart
const numbers = new Map(); // sequence -> the smallest number that no other living one had when it came
const nameOf = (sequence) => `${sequence.request_id}/${sequence.choice}`;

/** Gives each sequence a colour that is its own for its life, however many others come and go. */
export function colourSequences(sequences) {
  const living = new Set(sequences.map(nameOf));
  for (const name of numbers.keys()) if (!living.has(name)) numbers.delete(name);
  const taken = new Set(numbers.values());
  let next = 0;
  for (const name of living) {
    if (numbers.has(name)) continue;
    while (taken.has(next)) next++;
    numbers.set(name, next);
    taken.add(next);
  }
}

/** Degrees. */
export function hueOf(sequence) {
  return ((numbers.get(nameOf(sequence)) ?? 0) * GOLDEN_ANGLE + 210) % 360;
}

export class GroupMap {
  /** `show(text)` is told what the block under the pointer or the cursor holds. */
  constructor(parent, show) {
    this.title = document.createElement("h3");
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "block map");
    parent.append(this.title, this.canvas);
    this.show = show;
    this.chosen = 0;
    this.letters = "";
    this.canvas.addEventListener("pointermove", (event) => this.choose(this.blockAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.choose(0));
    this.canvas.addEventListener("blur", () => this.choose(0));
    this.canvas.addEventListener("focus", () => this.chosen || this.choose(1));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }

  remove() {
    this.title.remove();
    this.canvas.remove();
  }

  update(group, sequences, blockSize, several) {
    this.group = group;
    this.blockSize = blockSize;
    this.letters = unpackRuns(group.states);
    this.owners = new Map();
    for (const sequence of sequences) {
      for (const number of unpackRanges(sequence.blocks[group.index] ?? "")) {
        const owners = this.owners.get(number);
        if (owners) owners.push(sequence);
        else this.owners.set(number, [sequence]);
      }
    }
    const window = group.window === null ? "" : `, window ${group.window}`;
    this.title.textContent = `Group ${group.index}: ${group.kind}${window}`;
    this.title.hidden = !several;
    this.canvas.setAttribute("aria-label", `KV blocks: ${group.total} in all, ${group.used} used, ` +
      `${group.shared} shared, ${group.cached} cached, ${group.free} free. Arrow keys move from block to block.`);
    this.draw();
    if (this.chosen) this.show(this.describe(this.chosen));
  }

  draw() {
    const width = this.canvas.clientWidth;
    const total = this.letters.length;
    if (!width || !total) return;
    this.pitch = SIZES.find(([blocks]) => total <= blocks)[1];
    this.columns = Math.max(1, Math.floor(width / this.pitch));
    const height = Math.ceil(total / this.columns) * this.pitch;
    const scale = Math.min(window.devicePixelRatio || 1, TALLEST / height);
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(this.canvas);
    const colour = Object.fromEntries(["text", "free-line", "cached", "cached-line", "block-light", "accent"].map(
      (name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    for (let index = 0; index < total; index++) this.drawCell(context, index, colour);
    if (this.chosen) {
      const [x, y] = this.place(this.chosen - 1);
      context.strokeStyle = colour.accent;
      context.lineWidth = 2;
      context.strokeRect(x, y, this.pitch - 1, this.pitch - 1);
    }
  }

  drawCell(context, index, colour) {
    const [x, y] = this.place(index);
    const side = this.pitch - (this.pitch > 6 ? 2 : 1);
    const state = STATES[this.letters[index]];
    context.lineWidth = 1;
    if (state === "cached") {
      context.fillStyle = colour.cached;
      context.fillRect(x, y, side, side);
    } else if (state !== "free") {
      const owners = this.owners.get(index + 1);
      const filled = this.group.filled[index + 1] ?? this.blockSize;
      const height = filled ? Math.max(1, Math.round((side * filled) / this.blockSize)) : 0;
      context.fillStyle = `hsl(${owners ? hueOf(owners[0]) : 0} ${owners ? 60 : 0}% ${colour["block-light"]})`;
      context.fillRect(x, y + side - height, side, height);
    }
    if (side < 4) return; // no room for a frame
    context.strokeStyle = state === "free" ? colour["free-line"] : state === "shared" ? colour.text : colour["cached-line"];
    if (state === "shared") context.lineWidth = 2;
    context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
  }

  place(index) {
    return [(index % this.columns) * this.pitch, Math.floor(index / this.columns) * this.pitch];
  }

  /** The number of the block under the pointer; 0 = none. */
  blockAt(event) {
    const column = Math.floor(event.offsetX / this.pitch);
    const number = Math.floor(event.offsetY / this.pitch) * this.columns + column + 1;
    return column < this.columns && number <= this.letters.length ? number : 0;
  }

  choose(number) {
    if (number === this.chosen) return;
    this.chosen = number;
    this.draw();
    this.show(number ? this.describe(number) : "");
  }

  move(event) {
    const last = this.letters.length;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, Home: -last, End: last };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.choose(Math.min(last, Math.max(1, this.chosen + steps[event.key])));
  }

  describe(number) {
    const letter = this.letters[number - 1];
    if (!letter) return "";
    const state = STATES[letter];
    const indexed = "US".includes(letter) ? ", in the prefix index" : "";
    if (state === "free" || state === "cached") return `Block ${number}: ${state}`;
    const references = this.group.references[number] ?? 1;
    const filled = this.group.filled[number] ?? this.blockSize;
    const owners = this.owners.get(number) ?? [];
    const names = owners.slice(0, 4).map((owner) => `${owner.request_id} (choice ${owner.choice})`);
    if (owners.length > 4) names.push(`${owners.length - 4} more`);
    return `Block ${number}: ${state}, ${references} reference${references === 1 ? "" : "s"}, ` +
      `${filled} of ${this.blockSize} tokens${indexed}; ${names.join(", ")}`;
  }
}
