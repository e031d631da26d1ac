// Every way to steer with Anthropic's Node client; prints one JSON object.
import Anthropic from "@anthropic-ai/sdk";

const [baseURL, model, profile, content, strength] = process.argv.slice(2);
const client = new Anthropic({ baseURL: baseURL.replace(/\/v1$/, ""), apiKey: "none", maxRetries: 0 });
const ways = {
  name: { model: `${model}@${profile}` },
  body: { model, steering_profile: { name: profile, strength: Number(strength) } },
};
const found = {};

for (const [way, fields] of Object.entries(ways)) {
  const asked = { ...fields, messages: [{ role: "user", content }], temperature: 0, max_tokens: 16 };
  const message = await client.messages.create(asked);
  found[`messages ${way}`] = [message.content.map((block) => block.text).join(""), message.steering];

  const streamed = ["", null];
  for await (const event of await client.messages.create({ ...asked, stream: true })) {
    if (event.type === "content_block_delta") streamed[0] += event.delta.text;
    streamed[1] = event.steering ?? streamed[1];
  }
  found[`messages ${way} stream`] = streamed;
}

const refusal = await client.messages
  .create({ model: `${model}@unknown`, messages: [{ role: "user", content }], max_tokens: 4 })
  .catch((error) => [error.constructor.name, error.status, error.error?.error?.code]);
console.log(JSON.stringify({ found, refusal }));
