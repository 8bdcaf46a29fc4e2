// SPDX-License-Identifier: Apache-2.0
// One chart of the history: curves over time, an axis each way, and a cursor that all charts share.

import { age } from "./format.js";

const LEFT = 44, RIGHT = 6, TOP = 8, BOTTOM = 18; // of the plot inside the drawing, in pixels
const TICKS = [1, 2, 4, 6, 8, 10]; // ends of an axis, times a power of ten: their halves are short numbers

/** The moment that the reader points at; null: the latest. */
class Cursor extends EventTarget {
  time = null;

  move(time) {
    if (time === this.time) return;
    this.time = time;
    this.dispatchEvent(new Event("move"));
  }
}

export const cursor = new Cursor();

function draw(tag, attributes, parent) {
  const it = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) it.setAttribute(name, value);
  parent?.append(it);
  return it;
}

function endOfAxis(highest, atLeast) {
  const value = Math.max(highest, atLeast);
  const power = 10 ** Math.floor(Math.log10(value));
  return power * TICKS.find((tick) => tick * power >= value * (1 - 1e-9));
}

export class Chart {
  /**
   * @param {object} kind
   *   title, format (value => text), series: [{name, label}] with the field of a sample and what it is called beside
   *   others, atLeast: the lowest end of the value axis, end: (stats => end of the value axis) where it is fixed.
   */
  constructor(kind, parent) {
    this._kind = kind;
    this._samples = [];
    this._seconds = 1;
    this._maxSamples = 1;
    this._fixedEnd = null;
    this._figure = document.createElement("figure");
    this._figure.className = "card";
    this._figure.dataset.chart = kind.series[0].name;
    const caption = document.createElement("figcaption");
    const title = document.createElement("span");
    title.className = "chart_title";
    title.textContent = kind.title;
    const readout = document.createElement("span");
    readout.className = "readout";
    this._readouts = kind.series.map((_, i) => {
      const it = document.createElement("data");
      if (kind.series.length > 1) it.className = i === 0 ? "first" : "second";
      readout.append(it);
      return it;
    });
    caption.append(title, readout);
    this._svg = draw("svg", { role: "slider", tabindex: 0, "aria-label": `${kind.title}, the last ten minutes` });
    this._figure.append(caption, this._svg);
    parent.append(this._figure);
    this._svg.addEventListener("pointermove", (event) => this._point(event));
    this._svg.addEventListener("pointerdown", (event) => this._point(event));
    this._svg.addEventListener("pointerleave", () => cursor.move(null));
    this._svg.addEventListener("keydown", (event) => this._step(event));
    this._svg.addEventListener("blur", () => cursor.move(null));
    cursor.addEventListener("move", () => this._showCursor());
    new ResizeObserver(() => this._draw()).observe(this._svg);
  }

  /** Shows these samples, the oldest first; `maxSamples` of them fill the chart. */
  update(samples, seconds, maxSamples) {
    this._samples = samples;
    this._seconds = seconds;
    this._maxSamples = maxSamples;
    this._draw();
  }

  /** Called with the current /stats. */
  setEnd(stats) {
    const end = this._kind.end?.(stats) ?? null;
    if (end === this._fixedEnd) return;
    this._fixedEnd = end;
    this._draw();
  }

  get _latest() {
    return this._samples.at(-1).time;
  }

  _x(time) {
    const width = this._width - LEFT - RIGHT;
    return this._width - RIGHT - (width * (this._latest - time)) / (this._seconds * this._maxSamples);
  }

  _y(value) {
    return TOP + (this._height - TOP - BOTTOM) * (1 - value / this._end);
  }

  _draw() {
    this._width = this._svg.clientWidth;
    this._height = this._svg.clientHeight;
    if (this._width === 0 || this._samples.length === 0) return;
    const values = this._samples.flatMap((sample) => this._kind.series.map(({ name }) => sample[name] ?? 0));
    this._end = this._fixedEnd || endOfAxis(Math.max(...values), this._kind.atLeast);
    this._svg.setAttribute("viewBox", `0 0 ${this._width} ${this._height}`);
    this._svg.replaceChildren();
    this._drawAxes();
    for (const [i, { name }] of [...this._kind.series.entries()].reverse()) { // the first one on top
      const group = draw("g", { class: i === 0 ? "first" : "second" }, this._svg);
      for (const run of this._runs(name)) this._drawRun(run, group);
    }
    this._marks = draw("g", {}, this._svg);
    this._showCursor();
  }

  _drawAxes() {
    for (const value of [0, this._end / 2, this._end]) {
      const y = this._y(value);
      draw("path", { class: "grid", d: `M${LEFT} ${y}H${this._width - RIGHT}` }, this._svg);
      const label = draw("text", { x: LEFT - 6, y: y + 3.5, "text-anchor": "end" }, this._svg);
      label.textContent = this._kind.format(value);
    }
    const span = this._seconds * this._maxSamples;
    for (const [part, anchor] of [[1, "start"], [0.5, "middle"], [0, "end"]]) {
      const x = this._x(this._latest - part * span);
      const label = draw("text", { x, y: this._height - 4, "text-anchor": anchor }, this._svg);
      label.textContent = part === 0 ? "now" : `-${(part * span) / 60} min`;
    }
  }

  /** The points of a series, apart where there is no value or no sample. */
  _runs(name) {
    const runs = [];
    let last = null;
    for (const sample of this._samples) {
      if (sample[name] === null) {
        last = null;
        continue;
      }
      const follows = last !== null && sample.time - last < 1.5 * this._seconds;
      if (!follows) runs.push([]);
      runs.at(-1).push([this._x(sample.time).toFixed(1), this._y(sample[name]).toFixed(1)]);
      last = sample.time;
    }
    return runs;
  }

  _drawRun(points, parent) {
    const line = points.map((point) => point.join(" ")).join("L");
    if (this._kind.series.length === 1) {
      const floor = this._y(0);
      draw("path", { class: "area", d: `M${points[0][0]} ${floor}L${line}L${points.at(-1)[0]} ${floor}Z` }, parent);
    }
    draw("path", { class: "curve", d: `M${line}${points.length === 1 ? "h0" : ""}` }, parent);
  }

  _showCursor() {
    if (!this._marks) return;
    const sample = this._samples[this._index()];
    this._marks.replaceChildren();
    const texts = [];
    for (const [i, { name, label }] of this._kind.series.entries()) {
      const value = sample[name];
      const text = value === null ? "-" : this._kind.format(value);
      this._readouts[i].value = value ?? "";
      this._readouts[i].textContent = label ? `${label} ${text}` : text;
      texts.push(label ? `${label} ${text}` : text);
      if (cursor.time !== null && value !== null) {
        const dot = { class: `dot ${i === 0 ? "first" : "second"}`, r: 3, cx: this._x(sample.time), cy: this._y(value) };
        draw("circle", dot, this._marks);
      }
    }
    const ago = this._latest - sample.time;
    if (cursor.time !== null) {
      const x = this._x(sample.time);
      const isLeft = x < this._width / 2;
      draw("path", { class: "cursor", d: `M${x} ${TOP}V${this._height - BOTTOM}` }, this._marks);
      const label = { x: x + (isLeft ? 5 : -5), y: TOP + 5, "text-anchor": isLeft ? "start" : "end" };
      draw("text", label, this._marks).textContent = ago === 0 ? "now" : `${age(ago)} ago`;
    }
    this._figure.dataset.time = sample.time;
    this._svg.setAttribute("aria-valuemin", Math.round(this._samples[0].time - this._latest));
    this._svg.setAttribute("aria-valuemax", 0);
    this._svg.setAttribute("aria-valuenow", Math.round(-ago));
    this._svg.setAttribute("aria-valuetext", `${texts.join(", ")}, ${ago === 0 ? "latest" : `${age(ago)} ago`}`);
  }

  /** Index of the sample at the cursor. */
  _index() {
    if (cursor.time === null) return this._samples.length - 1;
    return this._nearest(cursor.time);
  }

  _nearest(time) {
    const distances = this._samples.map((sample) => Math.abs(sample.time - time));
    return distances.indexOf(Math.min(...distances));
  }

  _point(event) {
    if (this._samples.length === 0) return;
    const x = event.clientX - this._svg.getBoundingClientRect().left;
    const width = this._width - LEFT - RIGHT;
    const time = this._latest - ((this._width - RIGHT - x) / width) * this._seconds * this._maxSamples;
    cursor.move(this._samples[this._nearest(time)].time);
  }

  _step(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageDown: -15, PageUp: 15, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") cursor.move(null);
    if (!(event.key in steps) || this._samples.length === 0) return;
    event.preventDefault();
    const index = Math.min(Math.max(this._index() + steps[event.key], 0), this._samples.length - 1);
    cursor.move(this._samples[index].time);
  }
}
