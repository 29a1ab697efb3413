// Vercel's AI SDK with its OpenAI-compatible provider: streamText with a tool. The story is chat_story.py's.

import assert from "node:assert";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

// Of the folder it is run in, which has the packages; they are modules and can only be imported.
const from = (name, file) => import(pathToFileURL(`node_modules/${name}/${file}`));
const { jsonSchema, stepCountIs, streamText, tool } = await from("ai", "dist/index.js");
const { createOpenAICompatible } = await from("@ai-sdk/openai-compatible", "dist/index.js");

const [address, token] = process.argv.slice(2);
const asked = [];
const lookup = tool({
  description: "Find what is on file.",
  inputSchema: jsonSchema({ type: "object", properties: { key: { type: "string" } }, required: ["key"] }),
  execute: async ({ key }) => {
    asked.push(key);
    return "342";
  },
});
const provider = createOpenAICompatible({ name: "mlx", baseURL: address, apiKey: token });
const run = streamText({
  model: provider("embedded"),
  tools: { lookup },
  stopWhen: stepCountIs(5),
  prompt: "Look up Bob's badge.",
  onError: ({ error }) => {
    throw error;
  },
});
const pieces = [];
for await (const piece of run.textStream) pieces.push(piece);
assert.deepEqual(asked, ["Bob's badge"]);
assert.equal(pieces.join("").trim(), "342");
assert.ok(pieces.length > 1, `${JSON.stringify(pieces)} is no stream`);
const installed = JSON.parse(readFileSync("node_modules/ai/package.json"));
console.log(installed.name, installed.version);
