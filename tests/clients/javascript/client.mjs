// SPDX-License-Identifier: Apache-2.0
// Calls of OpenAI's client for JavaScript. Usage: node client.mjs CALL URL KEY; prints a line of JSON.
// It lies beside its node_modules when it runs.
import OpenAI from "openai";

const [call, baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const prompt = "def __init__(self";
const messages = [{ role: "user", content: "a" }];
const greedy = { model: "tiny", temperature: 0, max_tokens: 16, ignore_eos: true };
const long = { ...greedy, max_tokens: 8000 };
const usage = { stream: true, stream_options: { include_usage: true } };

async function all(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const failure = (error) => ({ name: error.constructor.name, status: error.status, code: error.code, param: error.param });

// The error of a promise that must not succeed.
const refused = (promise) => promise.then(() => null, failure);

const calls = {
  completions: async () => client.completions.create({ ...greedy, prompt: [prompt, "a"], n: 2, temperature: 0.9, seed: 7 }),
  chats: async () => ({
    answer: await client.chat.completions.create({ ...greedy, messages }),
    helper: await client.chat.completions.stream({ ...greedy, messages, ...usage }).finalChatCompletion(),
  }),
  streams: async () => all(await client.completions.create({ ...greedy, prompt, ...usage })),
  logprobs: async () => client.chat.completions.create({ ...greedy, messages, logprobs: true, top_logprobs: 3 }),
  models: async () => all(await client.models.list()),
  errors: async () => [
    await refused(client.completions.create({ ...greedy, prompt, model: "other" })),
    await refused(client.completions.create({ ...greedy, prompt, temperature: 3, stream: true })),
    await refused(new OpenAI({ baseURL, apiKey: "other", maxRetries: 0 }).models.list()),
  ],
  full: async () => refused(client.completions.create({ ...greedy, prompt })),
  retries: async () => client.completions.create({ ...greedy, prompt }, { maxRetries: 1 }),
  timeout: async () => refused(client.completions.create({ ...long, prompt }, { timeout: 300 })),
  abort: async () => {
    const stream = await client.completions.create({ ...long, prompt, stream: true });
    for await (const chunk of stream) return chunk.choices.length; // leaving the loop aborts the request
  },
};

console.log(JSON.stringify(await calls[call]()));
