// The TypeScript SDK's client, which checks structured results by the tools' output schemas. The story is story.py's.

import assert from "node:assert";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.cwd()}/`); // of the folder it is run in, which has the packages
const { Client } = require("@modelcontextprotocol/sdk/client/index.js");
const { StdioClientTransport } = require("@modelcontextprotocol/sdk/client/stdio.js");
const { StreamableHTTPClientTransport } = require("@modelcontextprotocol/sdk/client/streamableHttp.js");

const FACTS = "The code of Rex is 4096. The code of Kim is 771.";
const ANSWERS = { "What is the code of Rex?": "4096", "What is the code of Kim?": "771" };

const [entry, tools] = process.argv.slice(2).map((argument) => JSON.parse(argument));
const client = new Client({ name: "hosts", version: "1" });
await client.connect(
  entry.url
    ? new StreamableHTTPClientTransport(new URL(entry.url), { requestInit: { headers: entry.headers } })
    : new StdioClientTransport(entry),
);
assert.deepEqual((await client.listTools()).tools.map((tool) => tool.name), tools);

const call = async (name, args) => (await client.callTool({ name, arguments: args })).structuredContent;
const made = await call("create_session", { messages: [{ role: "user", content: FACTS }], ttl_s: 60 });
const forks = await call("fork_session", { session: made.session, count: 2 });
assert.equal(forks.tokens, made.tokens);
const asked = Object.keys(ANSWERS).map((prompt, i) => call("generate", { session: forks.sessions[i], prompt }));
const answers = await Promise.all(asked);
assert.deepEqual(answers.map((answer) => answer.text), Object.values(ANSWERS));
assert.ok(answers.every((answer) => answer.cached_tokens >= made.tokens));
const failed = await client.callTool({ name: "generate", arguments: { session: "s_nobody", prompt: "Hello" } });
assert.ok(failed.isError && failed.content[0].text.includes("list_sessions"));
const closed = await call("close_session", { sessions: [made.session, ...forks.sessions] });
assert.equal(closed.closed.length, 3);
await client.close();
const installed = JSON.parse(readFileSync("node_modules/@modelcontextprotocol/sdk/package.json"));
console.log(installed.name, installed.version);
