// An OpenID provider whose clients get access tokens for themselves: `node authorization_server.mjs PORT NODE_MODULES`.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [port, modules] = process.argv.slice(2);
const { Provider } = await import(pathToFileURL(createRequire(`${modules}/`).resolve('oidc-provider')));
const client = (name) => ({
  client_id: name,
  client_secret: `secret-of-${name}`,
  grant_types: ['client_credentials'],
  redirect_uris: [],
  response_types: [],
  token_endpoint_auth_method: 'client_secret_post',
});
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: ['ann', 'bob'].map(client),
  scopes: ['mlx'],
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_, resource) => ({ scope: 'mlx', audience: resource, accessTokenFormat: 'jwt' }),
    },
  },
});
provider.listen(Number(port), '127.0.0.1', () => console.log('ready'));
