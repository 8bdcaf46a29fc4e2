// SPDX-License-Identifier: Apache-2.0
// Starts the page, asks for the server's state every second, and for the API key where the server wants one.

import { getJson, hasKey, setKey } from "./api.js";
import { showModel, startChat } from "./chat.js";
import { showEngine, startEngine } from "./engine.js";

const POLL_MS = 1000;
const element = (id) => document.getElementById(id);
let timer = null;
let isLocked = false; // the server refuses the key
let lastPoll = 0; // number of the poll that decides about the next

function show(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text; // an unchanged alert is not read out again
}

function showState(state, text) {
  element("state").dataset.state = state;
  show("state", text);
}

function openKeyForm(isOpen) {
  element("key_form").hidden = !isOpen;
  element("change_key").hidden = false;
  element("change_key").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) element("key").focus();
}

function refuseKey(message) {
  show("key_error", hasKey() ? message : "");
  showState("locked", "an API key is needed");
  if (element("key_form").hidden) openKeyForm(true);
}

async function poll() {
  clearTimeout(timer);
  const own = ++lastPoll;
  try {
    if (!document.hidden) {
      const stats = await getJson("stats");
      if (own !== lastPoll) return;
      show("model", stats.model);
      show("stopped", stats.stopped);
      showState(stats.stopped ? "stopped" : "serving", stats.stopped ? "stopped" : "serving");
      showModel(stats);
      await showEngine(stats);
    }
  } catch (error) {
    if (own !== lastPoll) return;
    if (error.status === 401) {
      isLocked = true; // and nothing is asked until there is another key
      refuseKey(error.message);
      return;
    }
    showState("unreachable", error.status ? error.message : "no answer");
  }
  if (own === lastPoll) timer = setTimeout(poll, POLL_MS);
}

element("key_form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(element("key").value);
  element("key").value = "";
  show("key_error", "");
  openKeyForm(false);
  isLocked = false;
  poll();
});
element("change_key").addEventListener("click", () => openKeyForm(element("key_form").hidden));
element("change_key").hidden = !hasKey();
document.addEventListener("server-error", ({ detail }) => {
  if (detail.status === 401) refuseKey(detail.message);
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !isLocked) poll();
});
startChat();
startEngine();
poll();
