/* A request as a command for curl and as a Python program with the OpenAI client.
 *
 * The key is the environment variable EXPERTSTEER_API_KEY in both, never the one that the page has.
 */

const VARIABLE = "EXPERTSTEER_API_KEY";
// Characters that hide in an editor or turn the order of what is shown; escapes mean the same in JSON and in Python.
const HIDDEN = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** A command for a POSIX shell. */
export function curlText(url, body, needsKey) {
  const lines = [`curl -sS ${shell(url)}`, "-H 'content-type: application/json'"];
  if (needsKey) {
    lines.push(`-H "authorization: Bearer $${VARIABLE}"`);
  }
  lines.push(`-d ${shell(visible(JSON.stringify(body, null, 2)))}`);
  return `${lines.join(" \\\n  ")}\n`;
}

/** A program for Python 3 with the package `openai`; `base` is the address that ends in /v1. */
export function pythonText(base, body, needsKey) {
  const { steering_profile: profile, ...fields } = body;
  const method = "messages" in body ? "chat.completions" : "completions";
  const key = needsKey ? `os.environ["${VARIABLE}"]` : `os.environ.get("${VARIABLE}", "none")`;
  const lines = Object.entries(fields).map(([name, value]) => `    ${name}=${python(value, 4)},`);
  if (profile !== undefined) {
    lines.push(`    extra_body=${python({ steering_profile: profile }, 4)},`);
  }
  const text = "messages" in body ? "choices[0].message.content" : "choices[0].text";
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${quoted(base)}, api_key=${key})`,
    `answer = client.${method}.create(`,
    ...lines,
    ")",
    `print(answer.${text})`,
    ...(profile === undefined ? [] : ["print(answer.steering)"]),
    "",
  ].join("\n");
}

function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function visible(json) {
  return json.replace(HIDDEN, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** A JSON string is a Python string literal too. */
function quoted(text) {
  return visible(JSON.stringify(text));
}

function python(value, indent) {
  if (typeof value === "string") {
    return quoted(value);
  }
  if (value === null || typeof value === "boolean") {
    return { null: "None", true: "True", false: "False" }[String(value)];
  }
  if (typeof value === "number") {
    return String(value);
  }
  const inner = " ".repeat(indent + 4);
  const lines = Array.isArray(value)
    ? value.map((item) => python(item, indent + 4))
    : Object.entries(value).map(([name, item]) => `${quoted(name)}: ${python(item, indent + 4)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return `${open}\n${lines.map((line) => `${inner}${line},\n`).join("")}${" ".repeat(indent)}${close}`;
}
