// SPDX-License-Identifier: Apache-2.0
// The engine's state: figures of this moment, charts of the last ten minutes, requests under way.

import { getJson } from "./api.js";
import { Chart } from "./chart.js";
import { age, count, duration, share } from "./format.js";

const element = (id) => document.getElementById(id);
const percentiles = (name) => [{ name: `${name}_p50`, label: "p50" }, { name: `${name}_p95`, label: "p95" }];
const rate = (value) => `${count(value)}/s`;

const KINDS = [
  { title: "Generated tokens", format: rate, atLeast: 2, series: [{ name: "generated_tokens_per_second" }] },
  { title: "Prompt tokens computed", format: rate, atLeast: 2, series: [{ name: "prompt_tokens_per_second" }] },
  { title: "Prompt tokens from cache", format: share, atLeast: 1, series: [{ name: "cached_prefix_share" }] },
  { title: "Time to first token", format: duration, atLeast: 1e-3, series: percentiles("time_to_first_token") },
  { title: "Time between tokens", format: duration, atLeast: 1e-3, series: percentiles("inter_token") },
  { title: "Batch: running", format: count, atLeast: 2, series: [{ name: "requests_running" }] },
  { title: "Queue: waiting", format: count, atLeast: 2, series: [{ name: "requests_waiting" }] },
  { title: "Slots", format: count, atLeast: 2, series: [{ name: "slots_used" }], end: (stats) => stats.slots_total },
  { title: "KV blocks", format: count, atLeast: 2, series: [{ name: "kv_blocks_used" }], end: (stats) => stats.kv_blocks_total },
];

let charts = [];
let samples = [];
let latest = 0; // time of the last sample asked for

export function startEngine() {
  charts = KINDS.map((kind) => new Chart(kind, element("charts")));
}

/** Shows the current /stats, and the history as far as it has grown. */
export async function showEngine(stats) {
  element("running").textContent = stats.requests_running;
  element("waiting").textContent = stats.requests_waiting;
  element("slots").textContent = `${stats.slots_used} / ${stats.slots_total}`;
  element("kv_blocks").textContent = `${stats.kv_blocks_used} / ${stats.kv_blocks_total}`;
  for (const chart of charts) chart.setEnd(stats);
  showRequests(stats);
  if (stats.time < latest) { // another machine's clock: the server has moved
    samples = [];
    latest = 0;
  }
  const history = await getJson(`stats/history?since=${latest}`);
  const added = history.samples.filter((sample) => sample.time > latest); // another call may have been faster
  if (added.length === 0) return;
  latest = added.at(-1).time;
  const begin = latest - history.seconds * history.max_samples;
  samples = [...samples, ...added].filter((sample) => sample.time > begin);
  element("sample_seconds").textContent = history.seconds;
  for (const chart of charts) chart.update(samples, history.seconds, history.max_samples);
}

function showRequests({ requests, num_requests: numRequests }) {
  const rows = requests.map((request) => {
    const row = document.createElement("tr");
    row.dataset.state = request.state;
    const isPrefill = request.state === "prefill";
    const state = isPrefill ? `prefill ${count(request.prefilled_tokens)} of ${count(request.prompt_tokens)}` : request.state;
    for (const text of [request.id, state, count(request.prompt_tokens), count(request.generated_tokens), request.choices, age(request.seconds)]) {
      row.insertCell().textContent = text;
    }
    if (isPrefill) {
      const progress = document.createElement("progress");
      progress.max = request.prompt_tokens;
      progress.value = request.prefilled_tokens;
      progress.setAttribute("aria-hidden", "true"); // the text says the same
      row.cells[1].append(progress);
    }
    return row;
  });
  if (rows.length === 0) {
    const row = document.createElement("tr");
    const cell = row.insertCell();
    cell.className = "none";
    cell.colSpan = 6;
    cell.textContent = "none";
    rows.push(row);
  }
  element("requests").tBodies[0].replaceChildren(...rows);
  const numMore = numRequests - requests.length;
  element("more_requests").textContent = numMore > 0 ? `${count(numMore)} younger ones are not shown.` : "";
}
