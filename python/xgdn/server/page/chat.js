// SPDX-License-Identifier: Apache-2.0
// The conversation. What the model says is inserted as text, never as HTML.

import { postForEvents } from "./api.js";
import { duration } from "./format.js";

const element = (id) => document.getElementById(id);
const messages = element("messages");

let model = "";
let hasTemplate = true;
let turns = []; // {role, content}: what the next request repeats
let running = null; // AbortController of the answer under way

function make(tag, className, ...children) {
  const it = document.createElement(tag);
  if (className) it.className = className;
  it.append(...children);
  return it;
}

/** A message on the page; its parts appear when they have text. */
class Message {
  constructor(role, name) {
    this.content = "";
    this.hasParts = false;
    this._calls = new Map(); // by index: {name, arguments}, the nodes of their text
    this._text = document.createTextNode("");
    this._textBox = make("div", "text", this._text);
    this._root = make("article", "message", make("h3", "", name), this._textBox);
    this._root.dataset.role = role;
    messages.append(this._root);
  }

  addText(piece) {
    this.content += piece;
    this.hasParts = true;
    this._text.appendData(piece);
  }

  addReasoning(piece) {
    this.hasParts = true;
    if (!this._reasoning) {
      this._reasoning = document.createTextNode("");
      const summary = make("summary", "", "Reasoning");
      this._textBox.before(make("details", "reasoning", summary, make("div", "", this._reasoning)));
    }
    this._reasoning.appendData(piece);
  }

  addCall({ index, function: called = {} }) {
    this.hasParts = true;
    if (!this._calls.has(index)) {
      const call = { name: document.createTextNode(""), arguments: document.createTextNode("") };
      this._calls.set(index, call);
      const title = make("figcaption", "", "Tool call: ", make("code", "", call.name));
      this._root.append(make("figure", "call", title, make("pre", "", call.arguments)));
    }
    this._calls.get(index).name.appendData(called.name ?? "");
    this._calls.get(index).arguments.appendData(called.arguments ?? "");
  }

  addNote(text) {
    this._root.append(make("p", "note", text));
  }

  /** It stays to be read, but the next request does not repeat it. */
  fail() {
    this._root.classList.add("failed");
  }
}

/** Scrolls with the text, unless the reader has scrolled up. */
function following(change) {
  const isAtEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
  change();
  if (isAtEnd) messages.scrollTop = messages.scrollHeight;
}

function numberOf(id) {
  const value = element(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value; // JSON leaves out what is undefined
}

function order() {
  const common = {
    model,
    temperature: numberOf("temperature"),
    top_p: numberOf("top_p"),
    max_tokens: numberOf("max_tokens"),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (!hasTemplate) return ["v1/completions", { ...common, prompt: turns.map((turn) => turn.content).join("") }];
  const system = element("system").value;
  const thinking = element("thinking").value;
  return ["v1/chat/completions", {
    ...common,
    messages: system ? [{ role: "system", content: system }, ...turns] : turns,
    chat_template_kwargs: thinking ? { enable_thinking: thinking === "true" } : undefined,
  }];
}

async function receive(message, signal) {
  const begin = performance.now();
  let first = null;
  let reason = null;
  let usage = null;
  for await (const event of postForEvents(...order(), signal)) {
    usage = event.usage ?? usage;
    for (const choice of event.choices) {
      reason = choice.finish_reason ?? reason;
      const delta = choice.delta ?? { content: choice.text };
      following(() => {
        if (delta.reasoning_content) message.addReasoning(delta.reasoning_content);
        if (delta.content) message.addText(delta.content);
        for (const call of delta.tool_calls ?? []) message.addCall(call);
      });
      if (message.hasParts) first ??= performance.now();
    }
  }
  const parts = [];
  if (usage) parts.push(`${usage.completion_tokens} tokens in ${duration((performance.now() - begin) / 1e3)}`);
  if (first !== null) parts.push(`first text after ${duration((first - begin) / 1e3)}`);
  if (reason === "length") parts.push("ended at the maximum number of tokens");
  following(() => message.addNote(parts.join(", ")));
}

function setRunning(controller) {
  running = controller;
  element("send").disabled = controller !== null;
  element("stop").disabled = controller === null;
  messages.setAttribute("aria-busy", String(controller !== null)); // read out once it is complete
}

async function send() {
  const controller = new AbortController();
  const turn = { role: "user", content: element("prompt").value };
  const before = turns;
  turns = [...before, turn];
  setRunning(controller);
  element("error").textContent = "";
  element("prompt").value = "";
  const said = new Message("user", "You");
  said.addText(turn.content);
  const answer = new Message("assistant", model);
  messages.scrollTop = messages.scrollHeight;
  let isKept = false;
  try {
    await receive(answer, controller.signal);
    isKept = true;
  } catch (error) {
    if (running !== controller) return; // a new chat has begun
    if (error.name === "AbortError") {
      isKept = answer.content !== "";
      answer.addNote("stopped");
    } else {
      element("error").textContent = error.message;
      document.dispatchEvent(new CustomEvent("server-error", { detail: error }));
    }
  }
  if (isKept) {
    turns = [...turns, { role: "assistant", content: answer.content }];
  } else {
    turns = before;
    said.fail();
    answer.fail();
    element("prompt").value ||= turn.content;
  }
  setRunning(null);
  if (document.activeElement === document.body) element("prompt").focus(); // the button that had it is disabled now
}

function newChat() {
  const stopped = running;
  setRunning(null);
  stopped?.abort();
  turns = [];
  messages.replaceChildren();
  element("error").textContent = "";
  element("prompt").focus();
}

/** Called with the current /stats. */
export function showModel(stats) {
  model = stats.model;
  hasTemplate = stats.has_chat_template;
  element("no_template").hidden = hasTemplate;
  for (const it of document.querySelectorAll(".of_template")) it.hidden = !hasTemplate;
}

export function startChat() {
  const prompt = element("prompt");
  const hasKeyboard = !matchMedia("(pointer: coarse)").matches;
  element("keys_hint").hidden = !hasKeyboard;
  element("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running === null) send();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || !hasKeyboard) return;
    event.preventDefault();
    if (running === null) element("form").requestSubmit();
  });
  element("chat").addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  element("stop").addEventListener("click", () => running?.abort());
  element("new_chat").addEventListener("click", newChat);
  // A field that is wrong can only be shown when it is unfolded.
  element("settings").addEventListener("invalid", () => { element("settings").open = true; }, true);
}
