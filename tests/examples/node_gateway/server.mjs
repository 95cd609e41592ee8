// An HTTP tools gateway in front of the MCP servers that a Codex config.toml names, on the official npm client.
//
//     npm ci
//     node server.mjs --config ~/.codex/config.toml [--host 127.0.0.1] [--port 0] [--token-env GATEWAY_TOKEN]
//
// prints `listening on http://127.0.0.1:PORT`; then, in Python, HttpToolsInvoker("http://127.0.0.1:PORT").
// GET /tools gives OpenAI function tools, POST /invoke {name, arguments} calls one of them (X-Deadline-Ms: how long its
// caller waits), GET /health says how each server is, GET /healthz that the gateway is up. Servers are read from
// [mcp_servers.NAME] and [servers.NAME]: command, args, env, env_vars, cwd, or url, http_headers, env_http_headers,
// bearer_token_env_var; ${VAR} and ${VAR:-default} are filled in. Other hosts than loopback take a token. Linux only:
// servers run in sessions of their own (setsid), so that what a wrapper such as npx started ends with it.

import { createHash, timingSafeEqual } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { isDeepStrictEqual, parseArgs } from "node:util";
import {
  Client,
  ProtocolError,
  SdkError,
  SdkErrorCode,
  SSEClientTransport,
  StreamableHTTPClientTransport,
} from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";
import { AjvJsonSchemaValidator } from "@modelcontextprotocol/client/validators/ajv";
import { parse } from "smol-toml";

const MAX_BODY_BYTES = 1_000_000;
const MAX_CALLS = 64; // at a time; more are told to come back
const SECRET = /(key|token|secret|password|passwd|authorization|cookie|credentials?)$/i;

class Problem extends Error {
  constructor(status, code, message, retryable = false, headers = {}) {
    super(message);
    Object.assign(this, { status, code, retryable, headers });
  }
}

// Configuration

function filled(value, variables) {
  if (Array.isArray(value)) return value.map((each) => filled(each, variables));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, filled(v, variables)]));
  if (typeof value !== "string") return value;
  return value.replace(/(\$?)\$\{(?:env:)?(\w+)(?::-([^{}]*))?\}/g, (whole, escaped, name, fallback) => {
    if (escaped) return whole.slice(1);
    if (!process.env[name] && fallback !== undefined) return fallback;
    return variable(name, variables);
  });
}

function variable(name, variables) {
  if (process.env[name] === undefined) throw new Error(`the environment variable ${name} is not set`);
  return (variables[name] = process.env[name]);
}

function readServers(path) {
  const config = parse(readFileSync(path, "utf8"));
  const { mcp_servers = {}, servers = {} } = config;
  for (const name in servers)
    if (name in mcp_servers) throw new Error(`${path}: server ${JSON.stringify(name)} is there twice`);
  const entries = Object.entries({ ...mcp_servers, ...servers });
  return entries
    .filter(([, entry]) => entry.enabled !== false)
    .map(([name, entry]) => {
      try {
        return readServer(name, entry);
      } catch (error) {
        throw new Error(`${path}: server ${JSON.stringify(name)}: ${error.message}`);
      }
    });
}

function readServer(name, entry) {
  const used = {};
  const { command, args = [], env = {}, cwd, url, transport, type, ...rest } = filled(entry, used);
  if ((command === undefined) === (url === undefined)) throw new Error("it needs a command or a url, one of the two");
  const headers = { ...rest.headers, ...rest.http_headers };
  for (const [header, from] of Object.entries(rest.env_http_headers ?? {})) headers[header] = variable(from, used);
  if (rest.bearer_token_env_var) headers.Authorization = `Bearer ${variable(rest.bearer_token_env_var, used)}`;
  for (const from of rest.env_vars ?? []) if (process.env[from] !== undefined) env[from] ??= variable(from, used);
  const secrets = Object.entries({ ...env, ...headers, ...used })
    .filter(([key]) => SECRET.test(key))
    .map(([, value]) => String(value));
  return {
    name,
    command,
    args: args.map(String),
    cwd,
    url,
    headers,
    env: Object.fromEntries(Object.entries(env).map(([key, value]) => [key, String(value)])),
    sse: (transport ?? type) === "sse" || (url !== undefined && /\/sse\/?$/.test(new URL(url).pathname)),
    startupMs: 1000 * (rest.startup_timeout_sec ?? 10),
    toolMs: 1000 * (rest.tool_timeout_sec ?? 25),
    offers: (tool) => (rest.enabled_tools?.includes(tool) ?? true) && !rest.disabled_tools?.includes(tool),
    secrets: secrets
      .flatMap((each) => [each, each.replace(/^\w+ /, "")])
      .filter((each) => each.length >= 6)
      .sort((a, b) => b.length - a.length),
  };
}

// Servers

class SessionTransport extends StdioClientTransport {
  constructor(spec) {
    const { command, args, env, cwd } = spec;
    super({ command: "setsid", args: [command, ...args], env, cwd, stderr: "pipe", maxBufferSize: 32_000_000 });
    this.lastWords = "";
    this.stderr.on("data", (chunk) => (this.lastWords = (this.lastWords + chunk).slice(-500)));
  }

  async start() {
    await super.start();
    this.group = this.pid;
  }

  async close() {
    const timers = [setTimeout(() => this.kill("SIGTERM"), 1000), setTimeout(() => this.kill("SIGKILL"), 2000)];
    await super.close();
    timers.forEach(clearTimeout);
    this.kill("SIGKILL");
  }

  kill(signal) {
    try {
      if (this.group) process.kill(-this.group, signal);
    } catch {} // nothing is left of it
  }
}

class Server {
  state = "starting";
  error = "";
  restarts = 0;
  tools = new Map();
  #failures = 0;
  #closed = false;

  constructor(spec) {
    this.spec = spec;
  }

  // Settles, never rejects, when the server is ready or has failed
  async up() {
    if (this.state === "ready" || this.#closed) return;
    this.starting ??= this.#start().finally(() => (this.starting = undefined));
    await this.starting;
  }

  async #start() {
    if (this.state !== "starting") [this.state, this.restarts] = ["restarting", this.restarts + 1];
    const deadline = Date.now() + this.spec.startupMs;
    let why = "";
    // Old servers may exit at a probe that they don't know: they are asked again, in the old way
    for (const mode of this.spec.command === undefined ? ["auto"] : ["auto", "legacy"]) {
      if (this.#closed || Date.now() >= deadline) break;
      try {
        await this.#connect(mode, deadline);
        if (!this.#closed) [this.state, this.error, this.#failures] = ["ready", "", 0];
        return;
      } catch (error) {
        why = error.message;
        await this.client.close().catch(() => {});
      }
    }
    this.fail(why);
  }

  async #connect(mode, deadline) {
    const { command, url, headers, sse, startupMs } = this.spec;
    const remote = sse ? SSEClientTransport : StreamableHTTPClientTransport;
    const transport =
      command === undefined ? new remote(new URL(url), { requestInit: { headers } }) : new SessionTransport(this.spec);
    const client = new Client(
      { name: "agent-fsm-node-gateway", version: "0.1.0" },
      {
        versionNegotiation: { mode, probe: { timeoutMs: startupMs / 3 } },
        listChanged: { tools: { onChanged: (error, tools) => tools && this.#offer(tools) } },
      },
    );
    [this.client, this.transport] = [client, transport];
    const late = Math.max(1, deadline - Date.now());
    let timer;
    const timeout = new Promise(
      (_, reject) => (timer = setTimeout(reject, late, new Error(`not ready within ${startupMs / 1000} s`))),
    );
    const ready = (async () => {
      await client.connect(transport, { timeout: late });
      this.#offer((await client.listTools(undefined, { timeout: late })).tools);
    })();
    ready.catch(() => {}); // after the timeout nobody else listens
    await Promise.race([ready, timeout]).finally(() => clearTimeout(timer));
    client.onclose = () => {
      transport.kill?.("SIGKILL");
      if (client === this.client) this.fail("the server has closed the connection");
    };
  }

  #offer(tools) {
    const offered = tools.filter((tool) => this.spec.offers(tool.name)).reverse(); // listed twice: the first counts
    this.tools = new Map(offered.map((tool) => [tool.name, { tool, fault: checker(tool.inputSchema) }]).reverse());
  }

  // Starts again by itself after a while, a longer one each time
  fail(why) {
    if (this.#closed || this.state === "failed") return;
    const words = this.transport?.lastWords?.trim();
    [this.state, this.error] = ["failed", this.clean(words ? `${why}; it wrote: ${words}` : why)];
    setTimeout(() => this.up(), Math.min(60_000, 250 * 2 ** this.#failures++)).unref();
  }

  async call(tool, args, signal, timeout) {
    await Promise.race([this.starting, new Promise((resolve) => setTimeout(resolve, timeout).unref())]);
    const {
      spec: { name },
      client,
    } = this;
    if (this.state !== "ready")
      throw new Problem(
        503,
        "server_unavailable",
        `server ${name} is not up: ${this.error || "it is starting"}`,
        true,
        { "Retry-After": "1" },
      );
    try {
      return await client.callTool({ name: tool, arguments: args }, { signal, timeout });
    } catch (error) {
      if (error instanceof SdkError && error.code === SdkErrorCode.RequestTimeout) {
        throw new Problem(
          504,
          "timeout",
          `${tool} of ${name} gave no result within ${timeout / 1000} s; outcome unknown`,
        );
      }
      if (error instanceof ProtocolError) return { isError: true, content: [{ type: "text", text: told(error) }] };
      if (signal.aborted) throw error;
      if (client === this.client) this.fail(error.message); // its session may be lost, too: the next call gets a new one
      await client.close().catch(() => {});
      throw new Problem(
        502,
        "server_died",
        this.clean(`server ${name} failed during ${tool}, outcome unknown: ${error.message}`),
      );
    }
  }

  clean(text) {
    return this.spec.secrets.reduce((cleaned, secret) => cleaned.replaceAll(secret, "***"), text);
  }

  async close() {
    [this.#closed, this.state] = [true, "closed"];
    await this.client?.close().catch(() => {});
  }
}

const told = (error) =>
  error.message.startsWith("MCP error") ? error.message : `MCP error ${error.code}: ${error.message}`;

const validator = new AjvJsonSchemaValidator();

// Returns a function that says what is wrong with arguments, or ""; a schema that is broken forbids nothing
function checker(schema) {
  try {
    const check = validator.getValidator(schema);
    return (args) => check(args).errorMessage ?? "";
  } catch {
    return () => "";
  }
}

// Names and results

class Names {
  #byPlace = new Map(); // a name that was given stays, whichever servers come and go
  #byName = new Map();

  of(server, tool) {
    const place = `${server}\0${tool}`;
    if (!this.#byPlace.has(place)) {
      const plain = `${server}__${tool}`;
      const legal = plain.replace(/[^A-Za-z0-9_-]/gu, "_");
      const digest = createHash("sha256").update(place, "utf8").digest("hex").slice(0, 8);
      const name =
        legal !== plain || legal.length > 64 || this.#byName.has(legal) ? `${legal.slice(0, 55)}_${digest}` : legal;
      this.#byPlace.set(place, name);
      this.#byName.set(name, { server, tool });
    }
    return this.#byPlace.get(place);
  }

  place(name) {
    return this.#byName.get(name);
  }
}

function asOpenAI(name, { description, title, inputSchema, annotations }) {
  const { $schema, ...parameters } = inputSchema;
  const described = {
    name,
    description: description || title || "",
    parameters: { properties: {}, ...parameters, type: "object" },
  };
  return { type: "function", function: described, ...(annotations && { annotations }) };
}

const size = (base64) => Buffer.from(base64, "base64").length;

function line(block) {
  switch (block.type) {
    case "image":
    case "audio":
      return `[${block.type} ${block.mimeType}, ${size(block.data)} bytes]`;
    case "resource_link":
      return `[resource_link ${block.name} ${block.uri}${block.mimeType ? ` ${block.mimeType}` : ""}]`;
    case "resource": {
      const { uri, mimeType, text, blob } = block.resource;
      const parts = [uri, mimeType, blob !== undefined && `${size(blob)} bytes`].filter(Boolean).join(", ");
      return `[resource ${parts}]${text !== undefined ? `\n${text}` : ""}`;
    }
    default:
      return `[${block.type}] ${JSON.stringify(block)}`;
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function asAnswer({ content = [], structuredContent, isError = false }) {
  const texts = content.filter(({ type }) => type === "text").map(({ text }) => text);
  const others = content.filter(({ type }) => type !== "text");
  const lines = [...texts, ...others.map(line)];
  if (structuredContent != null && !said(structuredContent, texts)) lines.push(JSON.stringify(structuredContent));
  const text = lines.join("\n");
  return {
    ...(isError ? { error: text } : { text }),
    content: others,
    ...(structuredContent != null && { structuredContent }),
    isError,
  };
}

function said(structured, texts) {
  const only = structured && typeof structured === "object" && isDeepStrictEqual(Object.keys(structured), ["result"]);
  return texts.some((text) => {
    const value = parsed(text);
    if (value !== undefined && isDeepStrictEqual(value, structured)) return true;
    return only && (text === structured.result || (value !== undefined && isDeepStrictEqual(value, structured.result)));
  });
}

// HTTP

class Gateway {
  #names = new Names();
  #calls = 0;

  constructor(specs, token) {
    this.servers = specs.map((spec) => new Server(spec));
    this.token = token && Buffer.from(token);
  }

  async answer(request, response) {
    const { pathname } = new URL(request.url, "http://gateway");
    if (pathname === "/healthz") return { status: "ok" };
    this.#admit(request.headers);
    const route = {
      "/tools": ["GET", () => this.tools()],
      "/health": ["GET", () => this.health()],
      "/invoke": ["POST", () => this.invoke(request, response)],
    }[pathname];
    if (!route) throw new Problem(404, "not_found", "there are GET /tools, POST /invoke, GET /health and GET /healthz");
    if (route[0] !== request.method)
      throw new Problem(405, "method_not_allowed", `${pathname} takes ${route[0]}`, false, { Allow: route[0] });
    return route[1]();
  }

  #admit({ authorization = "", host = "", origin }) {
    if (!this.token) {
      for (const url of [`http://${host}`, origin ?? "http://localhost"]) {
        if (!isLoopback(URL.canParse(url) ? new URL(url).hostname : ""))
          throw new Problem(403, "host_not_allowed", "without a token this answers only to this machine");
      }
      return;
    }
    const [, given = ""] = /^bearer +(.*)$/i.exec(authorization) ?? [];
    const digest = (bytes) => createHash("sha256").update(bytes).digest(); // timingSafeEqual takes equal lengths only
    if (!timingSafeEqual(digest(Buffer.from(given, "latin1")), digest(this.token))) {
      throw new Problem(401, "unauthorized", "send the header Authorization: Bearer TOKEN", false, {
        "WWW-Authenticate": "Bearer",
      });
    }
  }

  // Waits for servers that start, but for those that never worked only once
  async #listed() {
    await Promise.all(
      this.servers.map(({ state, tools, starting }) => (state === "starting" || tools.size) && starting),
    );
    return this.servers.flatMap((server) =>
      [...server.tools.values()].map(({ tool }) => ({
        server,
        tool,
        name: this.#names.of(server.spec.name, tool.name),
      })),
    );
  }

  async tools() {
    const listed = await this.#listed();
    const ready = this.servers.filter(({ state }) => state === "ready");
    if (this.servers.length && !ready.length) {
      throw new Problem(
        503,
        "no_server",
        `no server is up: ${this.servers.map(({ spec, error }) => `${spec.name}: ${error}`).join("; ")}`,
        true,
      );
    }
    return listed.filter(({ server }) => ready.includes(server)).map(({ name, tool }) => asOpenAI(name, tool));
  }

  health() {
    const servers = this.servers.map(({ spec, state, error, tools, restarts }) => [
      spec.name,
      { state, error, tools: tools.size, restarts },
    ]);
    return {
      status: servers.every(([, { state }]) => state === "ready") ? "ok" : "degraded",
      servers: Object.fromEntries(servers),
    };
  }

  async invoke(request, response) {
    const { name, args, deadlineMs } = await readCall(request);
    if (!this.#names.place(name)) await this.#listed();
    const place = this.#names.place(name);
    const server = this.servers.find(({ spec }) => spec.name === place?.server);
    const known = server?.tools.get(place.tool);
    if (!known)
      throw new Problem(
        404,
        "unknown_tool",
        `there is no tool ${JSON.stringify(name)}; GET /tools lists those there are`,
      );
    const fault = known.fault(args);
    if (fault) throw new Problem(422, "invalid_arguments", `the arguments do not fit the schema of ${name}: ${fault}`);
    if (deadlineMs <= 0) throw new Problem(504, "timeout", "the deadline has passed, nothing was sent");
    if (this.#calls >= MAX_CALLS)
      throw new Problem(429, "busy", `${MAX_CALLS} calls are running`, true, { "Retry-After": "1" });
    const gone = new AbortController();
    response.on("close", () => gone.abort());
    this.#calls += 1;
    try {
      const answer = asAnswer(
        await server.call(place.tool, args, gone.signal, Math.min(deadlineMs, server.spec.toolMs)),
      );
      return JSON.parse(JSON.stringify(answer), (_, value) =>
        typeof value === "string" ? server.clean(value) : value,
      );
    } finally {
      this.#calls -= 1;
    }
  }
}

async function readCall(request) {
  const chunks = [];
  let bytes = 0;
  for await (const chunk of request) {
    bytes += chunk.length;
    if (bytes <= MAX_BODY_BYTES) chunks.push(chunk);
    else if (bytes > 8 * MAX_BODY_BYTES) break; // what is a little too large is read and forgotten: its sender would not listen before
  }
  if (bytes > MAX_BODY_BYTES)
    throw new Problem(413, "too_large", `the body has more than ${MAX_BODY_BYTES} bytes`, false, {
      Connection: "close",
    });
  const body = parsed(Buffer.concat(chunks).toString("utf8"));
  if (body === undefined) throw new Problem(400, "invalid_json", "the body is not valid JSON");
  const { name, arguments: given = {} } = body ?? {};
  if (typeof name !== "string") throw new Problem(422, "invalid_request", "name must be a string");
  const args = typeof given === "string" ? parsed(given.trim() || "{}") : (given ?? {});
  if (typeof args !== "object" || args === null || Array.isArray(args))
    throw new Problem(422, "invalid_arguments", "arguments must be a JSON object, or a string that holds one");
  const deadline = request.headers["x-deadline-ms"];
  if (deadline !== undefined && !/^-?\d{1,12}(\.\d+)?$/.test(deadline))
    throw new Problem(422, "invalid_request", "X-Deadline-Ms must be a number of milliseconds");
  return { name, args, deadlineMs: deadline === undefined ? Infinity : Number(deadline) };
}

const isLoopback = (host) => /^(localhost\.?|127(\.\d+){3}|\[?::1\]?)$/i.test(host);

async function handle(gateway, request, response) {
  const send = (status, value, headers = {}) => {
    const body = Buffer.from(JSON.stringify(value));
    response
      .writeHead(status, { "Content-Type": "application/json", "Content-Length": body.length, ...headers })
      .end(body);
  };
  try {
    send(200, await gateway.answer(request, response));
  } catch (error) {
    if (response.destroyed) return; // its client has gone
    const known = error instanceof Problem;
    if (!known) console.error(error);
    const { status, code, message, retryable, headers } = known
      ? error
      : new Problem(500, "internal_error", "the gateway failed; its log says how");
    send(status, { error: { code, message, retryable } }, headers);
  }
}

function main() {
  const { values } = parseArgs({
    options: {
      config: { type: "string" },
      host: { type: "string", default: "127.0.0.1" },
      port: { type: "string", default: "0" },
      "token-env": { type: "string" },
    },
  });
  if (!values.config) throw new Error("--config FILE is needed");
  const token = values["token-env"] && process.env[values["token-env"]];
  if (values["token-env"] && !token) throw new Error(`the environment variable ${values["token-env"]} is not set`);
  if (!token && !isLoopback(values.host))
    throw new Error(`listening on ${values.host} takes a token: --token-env NAME`);

  const gateway = new Gateway(readServers(values.config), token);
  gateway.servers.forEach((server) => server.up());
  const http = createServer({ requestTimeout: 30_000 }, (request, response) => handle(gateway, request, response));
  http.listen(Number(values.port), values.host, () => {
    const { address, port, family } = http.address();
    console.log(`listening on http://${family === "IPv6" ? `[${address}]` : address}:${port}`);
  });
  const stop = async () => {
    http.close();
    await Promise.all(gateway.servers.map((server) => server.close()));
    process.exit(0);
  };
  process.once("SIGTERM", stop).once("SIGINT", stop);
  process.on("unhandledRejection", (error) => console.error(error)); // of one server: the others go on
  process.on("exit", () => gateway.servers.forEach(({ transport }) => transport?.kill?.("SIGKILL")));
}

try {
  main();
} catch (error) {
  console.error(`node_gateway: ${error.message}`);
  process.exit(2);
}
