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

const parameters = {
  type: "object",
  properties: { colour: { enum: ["red", "green"] }, is_new: { type: "boolean" } },
  required: ["colour", "is_new"],
  additionalProperties: false,
};
const ends = { model: "tiny", temperature: 0, max_tokens: 100 };
const response = { model: "tiny", temperature: 0, max_output_tokens: 16, input: "a" };

// A helper of the client asks until the model calls no more: the second time it may not.
async function runTool() {
  const given = [];
  const paint = { name: "paint", parameters, parse: JSON.parse, function: (values) => given.push(values) && "done" };
  const tools = [{ type: "function", function: paint }];
  const tool_choice = { type: "function", function: { name: "paint" } };
  const runner = client.chat.completions.runTools({ ...ends, messages, tools, tool_choice, parallel_tool_calls: false });
  await runner.done();
  return { given, roles: runner.messages.map((message) => message.role) };
}

const calls = {
  structured: async () => {
    const response_format = { type: "json_schema", json_schema: { name: "paint", schema: parameters, strict: true } };
    const whole = await client.chat.completions.parse({ ...ends, messages, response_format });
    const stream = await client.chat.completions.stream({ ...ends, messages, response_format }).finalChatCompletion();
    return [whole.choices[0].message.parsed, JSON.parse(stream.choices[0].message.content)];
  },
  tools: runTool,
  responses: async () => {
    const whole = await client.responses.create(response);
    const stream = await all(await client.responses.create({ ...response, stream: true }));
    const final = await client.responses.stream(response).finalResponse();
    const next = await client.responses.create({ ...response, input: "b", previous_response_id: whole.id });
    return { texts: [whole.output_text, final.output_text, next.output_text], events: stream.map((event) => event.type) };
  },
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
